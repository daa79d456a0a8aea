"""LD-MoLE on DeepSpeed clusters: mixtures of LoRA experts with learned dynamic routing, spread over ranks."""

from ldmole_dist.tuner.model import LdMoleConfig

__all__ = ["LdMoleConfig"]
