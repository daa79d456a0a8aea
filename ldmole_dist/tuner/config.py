"""The PEFT config of an LD-MoLE adapter, saved as adapter_config.json."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from peft import PeftConfig
from pydantic import BaseModel, Field, ValidationError, create_model

from ldmole_dist.config.adapter import AdapterFields, Positive, check_top_k
from ldmole_dist.config.explain import explain
from ldmole_dist.tuner.model_card import CARD_NAME, complete_card

FORMAT_VERSION = 1

Names = list[str] | set[str] | str


class LdMolePeftType(str, Enum):  # noqa: UP042  # PEFT reads the name from str(), which is the value in a StrEnum
    """The `peft_type` of LD-MoLE. PEFT's own enumeration of methods cannot be extended."""

    LDMOLE = "LDMOLE"


@dataclass
class LdMoleConfig(AdapterFields, PeftConfig):
    """Config of an LD-MoLE adapter for `peft.get_peft_model`.

    It has the fields of `AdapterFields`, whose defaults are those of the paper except for `lambda_init`, and those of
    `peft.LoraConfig` that apply to LD-MoLE. The config does not depend on the number of ranks.

    Raises:
        ValueError: if a field has a wrong type or is out of range; if `router` is "topk" and `top_k` exceeds the smallest
            number of experts; if `layers_to_transform` or `layers_pattern` is set without the field that it needs; or if the
            adapter was saved in a newer format.
    """

    target_modules: Names | None = field(  # type: ignore[assignment]  # also None, and sets, as in PEFT's configs
        default=None,
        metadata={
            "help": "Names of the linears to adapt, one regular expression that their full names must match, or 'all-linear'. "
            "None: the paper's seven linears of a decoder layer if the model has them, otherwise all linears in its layers."
        },
    )
    exclude_modules: Names | None = field(
        default=None,
        metadata={"help": "Names of linears not to adapt, or one regular expression for their full names."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={
            "help": "Indices of the layers to adapt; None: all layers. Not with a regular expression or 'all-linear'."
        },
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the module lists that layers_to_transform indexes, such as 'layers'; None: any."},
    )
    rank_pattern: dict[str, Positive] = field(
        default_factory=dict,
        metadata={"help": "LoRA rank of individual linears, by name or regular expression; the others have rank r."},
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = field(
        default_factory=dict,
        metadata={
            "help": "lora_alpha of individual linears, by name or regular expression; the others have lora_alpha."
        },
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Scale the experts' output by lora_alpha / sqrt(r) in place of lora_alpha / r."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Ids of the tokens whose embeddings are trained: a list for the input embedding, or a dict that maps names "
            "of embeddings to lists."
        },
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "Keep embeddings in modules_to_save or trainable_token_indices tied to the output head."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Initialize B to 0, so that a new adapter does not change any output. False draws B at random."
        },
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
        self._check_types()
        check_top_k(self)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} needs a list of names in target_modules, which is "
                f"{self.target_modules!r}; list the names of the linears, or remove layers_to_transform"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform; set the indices of the "
                "layers, or remove layers_pattern"
            )

    def _check_types(self) -> None:
        checker = _checker()
        given = {name: getattr(self, name) for name in checker.model_fields}
        try:
            checked = checker.model_validate(given)
        except ValidationError as error:
            raise ValueError(explain(error, LdMoleConfig)) from error
        for name, value in given.items():
            # Keep a value that differs only in type, such as 16 for 16.0, so that adapter_config.json is saved as it was read.
            if getattr(checked, name) != value:
                setattr(self, name, getattr(checked, name))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json. If `PeftModel.save_pretrained` calls this method, also complete its model card."""
        super().save_pretrained(save_directory, **kwargs)
        if "auto_mapping_dict" in kwargs:  # only PeftModel passes it
            folder = Path(save_directory)
            # The card of an adapter that is not named "default" is in the parent folder.
            complete_card(next(path for f in (folder, folder.parent) if (path := f / CARD_NAME).is_file()))

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict, with sets as sorted lists, so that equal configs are saved as equal files."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}


def narrowed(config: PeftConfig) -> LdMoleConfig:
    """Return the config unchanged, typed as `LdMoleConfig`; PEFT types the configs of a tuner as `PeftConfig`."""
    assert isinstance(config, LdMoleConfig)
    return config


@cache
def _checker() -> type[BaseModel]:
    """Return a pydantic model of the fields that `PeftConfig` does not have.

    The fields of `PeftConfig` are not checked, because PEFT sets some of them to values of other types than the annotated ones.
    """
    hints = typing.get_type_hints(LdMoleConfig, include_extras=True)
    names = [f.name for f in fields(LdMoleConfig) if f.name not in {f.name for f in fields(PeftConfig)}]
    model: type[BaseModel] = create_model("LdMoleConfigFields", **{name: (hints[name], ...) for name in names})  # type: ignore[call-overload]
    return model
