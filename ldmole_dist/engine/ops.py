"""Availability of the compiled operator that DeepSpeed's optimizers need."""

from __future__ import annotations

import shutil

_OPS = {"fused_adam": "fused_adam", "cpu_adam": "cpu_adam"}  # by optimisation.optimizer; "adamw" needs none


def how_built(optimizer: str) -> str:
    """Return "not needed", "prebuilt", "built at the first start" or, if tools are missing, "cannot be built: ..."."""
    if optimizer not in _OPS:
        return "not needed"
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get(_OPS[optimizer]):
        return "prebuilt"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    return f"cannot be built: no {' and no '.join(missing)}" if missing else "built at the first start"
