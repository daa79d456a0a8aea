"""The PEFT config of an LD-MoLE adapter, saved as adapter_config.json."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum

from peft import PeftConfig
from pydantic import TypeAdapter, ValidationError

from ldmole_dist.config.adapter import AdapterFields, check_top_k
from ldmole_dist.config.explain import explain

FORMAT_VERSION = 1
_FIELDS = TypeAdapter(AdapterFields)


class LdMolePeftType(StrEnum):
    """The `peft_type` of LD-MoLE. PEFT's own enumeration of methods cannot be extended."""

    LDMOLE = "LDMOLE"


@dataclass
class LdMoleConfig(AdapterFields, PeftConfig):
    """Config of an LD-MoLE adapter for `peft.get_peft_model`.

    It has the fields of `AdapterFields`, whose defaults are those of the paper except for `lambda_init`. The config does not
    depend on the number of ranks.

    Raises:
        ValueError: if a field has a wrong type or is out of range; if `router` is "topk" and `top_k` exceeds the smallest
            number of experts; or if the adapter was saved in a newer format.
    """

    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of linears not to adapt, or one regular expression for their full names."},
    )
    train_experts: bool = field(
        default=True,
        metadata={
            "help": "Train the experts. False, as `ldmole compose` sets it, trains routers and lambda-MLPs only."
        },
    )
    init_seed: int = field(
        default=0,
        metadata={"help": "Seed of the initial values, which depend only on the seed, the module and the expert."},
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the adapter file format."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LdMolePeftType.LDMOLE
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version} is newer than the version that this ldmole_dist reads "
                f"({FORMAT_VERSION}); upgrade ldmole_dist"
            )
        given = {f.name: getattr(self, f.name) for f in fields(AdapterFields)}
        try:
            checked = _FIELDS.validate_python(given)
        except ValidationError as error:
            raise ValueError(explain(error, AdapterFields)) from error
        for name, value in given.items():
            # Keep a value that differs only in type, such as 16 for 16.0, so that adapter_config.json is saved as it was read.
            if getattr(checked, name) != value:
                setattr(self, name, getattr(checked, name))
        check_top_k(self)
