"""Register LD-MoLE in PEFT's tables of methods."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from ldmole_dist.tuner.config import LdMoleConfig, LdMolePeftType
from ldmole_dist.tuner.model import LdMoleModel


def register() -> None:
    """Register LD-MoLE with PEFT. Importing `ldmole_dist.tuner` calls this function."""
    # PEFT's register_peft_method accepts only names in its own enumeration of methods; the tables accept any key.
    tables: list[tuple[Any, Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, LdMoleConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, LdMoleModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, LdMoleModel.prefix),
    ]
    for table, entry in tables:
        table[LdMolePeftType.LDMOLE] = entry
