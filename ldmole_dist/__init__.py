"""LD-MoLE on DeepSpeed: mixtures of LoRA experts with learned dynamic routing, distributed over ranks.

The public names are imported on first use, so that `import ldmole_dist` imports neither torch nor PEFT (docs/api.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ldmole_dist.model.peft_registration import register_with_peft

if TYPE_CHECKING:
    from ldmole_dist.config import load_config
    from ldmole_dist.hf_trainer import AuxiliaryLosses, LdMoleTrainer
    from ldmole_dist.method.context import LossWeights
    from ldmole_dist.method.sparsegen import sparsegen
    from ldmole_dist.training.run import train
    from ldmole_dist.tuner.config import LdMoleConfig
    from ldmole_dist.tuner.model import tuner_of

__all__ = [
    "AuxiliaryLosses",
    "LdMoleConfig",
    "LdMoleTrainer",
    "LossWeights",
    "load_config",
    "sparsegen",
    "train",
    "tuner_of",
]

_MODULES = {
    "AuxiliaryLosses": "hf_trainer",
    "LdMoleConfig": "tuner.config",
    "LdMoleTrainer": "hf_trainer",
    "LossWeights": "method.context",
    "load_config": "config",
    "sparsegen": "method.sparsegen",
    "train": "training.run",
    "tuner_of": "tuner.model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # so that this function runs once per name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_peft()
