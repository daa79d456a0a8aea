"""Availability of the compiled operators that DeepSpeed's optimizers need."""

from __future__ import annotations

import shutil

# DeepSpeed's operator for each value of optimisation.optimizer; "adamw" needs none.
_OPS = {"fused_adam": "fused_adam", "cpu_adam": "cpu_adam"}


def how_built(optimizer: str) -> str:
    """Return how the compiled operator of an optimizer is built.

    Args:
        optimizer: value of optimisation.optimizer.

    Returns:
        "not needed", "prebuilt" or "built at the first start"; if tools are missing, "cannot be built: " and their names, such
        as "cannot be built: no g++ and no ninja".
    """
    if optimizer not in _OPS:
        return "not needed"
    from deepspeed.git_version_info import installed_ops

    if installed_ops.get(_OPS[optimizer]):
        return "prebuilt"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    return f"cannot be built: no {' and no '.join(missing)}" if missing else "built at the first start"
