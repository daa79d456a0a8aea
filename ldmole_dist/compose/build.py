"""An LD-MoLE adapter whose experts are LoRA adapters that exist already; only its routers are left to train.

Expert e of a linear is s_e B_e A_e of the e-th LoRA adapter; one that does not adapt the linear changes nothing there. Smaller
ranks are filled up with zeros, which change nothing either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ldmole_dist.checkpoint.export import METADATA
from ldmole_dist.checkpoint.files import Entry, write_tensors
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_folder, write_errors
from ldmole_dist.model.backbone import check_backbone, new_adapter
from ldmole_dist.parallel.placement import seeded
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import LdMoleLinear, adapter_keys, tuner_of


class Expert(NamedTuple):
    """What one LoRA adapter has for one linear.

    Args:
        A_key: name of A (R, D) in its file.
        B_key: name of B (O, R).
        rank: R.
        scaling: what B A is multiplied with.
    """

    A_key: str
    B_key: str
    rank: int
    scaling: float


class Lora(NamedTuple):
    """A LoRA adapter that can be an expert.

    Args:
        folder: of it.
        backbone: that it was made for.
        experts: by the linear's name in the backbone.
    """

    folder: Path
    backbone: str
    experts: dict[str, Expert]


def compose(
    output: str,
    adapters: Sequence[str],
    backbone: str | None,
    router: str = "sparsegen",
    top_k: int = 2,
    router_input: str = "layer",
) -> LdMoleConfig:
    """Write the adapter; one bank is in memory at a time.

    Args:
        output: folder to make.
        adapters: folders of LoRA adapters.
        backbone: path of the backbone, if it is not where they say.
        router: see `LdMoleConfig`.
        top_k: see there.
        router_input: see there.

    Returns:
        The config of what was written.

    Raises:
        UserError: where an adapter cannot be an expert, the adapters do not go together, or the folder exists.
    """
    folder = Path(output)
    if folder.exists():
        raise UserError(f"{output} exists already: remove it or choose another folder")
    path = backbone or _config_of(adapters[0]).base_model_name_or_path
    if not path:
        raise UserError(f"the adapter in {adapters[0]} does not say what its backbone is: give --backbone")
    loras = [_lora(name, path, given=backbone is not None) for name in adapters]
    names = list(dict.fromkeys(name for lora in loras for name in lora.experts))
    rank = max(expert.rank for lora in loras for expert in lora.experts.values())
    try:
        config = LdMoleConfig(
            r=rank,
            lora_alpha=rank,  # each expert's own scaling is in its B
            lora_dropout=0.0,
            num_experts=len(loras),
            target_modules=names,
            router=router,
            top_k=top_k,
            router_input=router_input,
            train_experts=False,
            task_type="CAUSAL_LM",
            base_model_name_or_path=path,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    model: Any = new_adapter(_skeleton(path), config)
    keys = adapter_keys(model)
    linears = {module.name: module for module in model.modules() if isinstance(module, LdMoleLinear)}
    banks: dict[str, tuple[str, str]] = {}  # name of a parameter -> linear, "A" or "B"
    for linear_path, module in model.named_modules():
        if isinstance(module, LdMoleLinear):
            banks |= {
                f"{linear_path}.lora_A.default": (module.name, "A"),
                f"{linear_path}.lora_B.default": (module.name, "B"),
            }
    _draw_routers(model, linears, config)
    parameters = dict(model.named_parameters())
    entries = [Entry(key, tuple(parameters[name].shape), torch.float32) for name, key in keys.items()]
    with write_errors(f"the adapter {folder}"), atomic_folder(folder) as unfinished:
        config.inference_mode = True
        config.save_pretrained(str(unfinished))
        values = (_bank(loras, *banks[n], parameters[n]) if n in banks else parameters[n].detach() for n in keys)
        write_tensors(unfinished / SAFETENSORS_WEIGHTS_NAME, entries, values, METADATA)
    return config


def _draw_routers(model: Any, linears: dict[str, LdMoleLinear], config: LdMoleConfig) -> None:
    """Give routers and lambda-MLPs, which have no values on the meta device, those that a new adapter would have."""
    for name, linear in linears.items():
        router: Any = linear.router["default"].to_empty(device="cpu")
        router.reset(seeded(config.init_seed, name, "router"))
    for in_features, mlp in tuner_of(model).lambda_mlp["default"].items():  # type: ignore[operator, union-attr]
        mlp.to_empty(device="cpu").reset(seeded(config.init_seed, "lambda_mlp", int(in_features)), config.lambda_init)


def _bank(loras: Sequence[Lora], linear: str, part: str, like: Tensor) -> Tensor:
    """(E, R, D) of A or (E, O, R) of B."""
    bank = torch.zeros(like.shape)
    for number, lora in enumerate(loras):
        if (expert := lora.experts.get(linear)) is not None:
            with safe_open(lora.folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
                if part == "A":
                    bank[number, : expert.rank] = file.get_tensor(expert.A_key).float()
                else:
                    bank[number, :, : expert.rank] = file.get_tensor(expert.B_key).float() * expert.scaling
    return bank


def _config_of(folder: str) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"there is no adapter that can be read in {folder!r}: {error}") from error
    if type(config) is not LoraConfig:
        raise UserError(f"the adapter in {folder!r} is {config.peft_type}: only LoRA adapters can be experts")
    return config


def _lora(folder: str, backbone: str, given: bool) -> Lora:
    config = _config_of(folder)
    refused = {
        "DoRA": config.use_dora,
        f"bias={config.bias!r}": config.bias != "none" or config.lora_bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
    }
    if found := [name for name, value in refused.items() if value]:
        raise UserError(
            f"the adapter in {folder!r} has {', '.join(found)}, which no expert can have: it must be plain LoRA"
        )
    if not given and config.base_model_name_or_path != backbone:
        raise UserError(
            f"the adapter in {folder!r} is for {config.base_model_name_or_path}, the first one for {backbone}: give adapters "
            "of one backbone, or --backbone where that is only another path of the same"
        )
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as file:
            # A safetensors file has keys() only.
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    # PEFT itself says what the config means: patterns of ranks and alphas, layers, rank-stabilised scaling.
    config.init_lora_weights = False
    model: Any = get_peft_model(_skeleton(backbone), config)
    experts = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            expert = Expert(
                f"base_model.model.{name}.lora_A.weight",
                f"base_model.model.{name}.lora_B.weight",
                module.r["default"],
                module.scaling["default"],
            )
            plain = type(module) is LoraLinear and not getattr(module, "fan_in_fan_out", False)
            expected = [[expert.rank, module.in_features], [module.out_features, expert.rank]]
            if not plain or [shapes.get(expert.A_key), shapes.get(expert.B_key)] != expected:
                raise UserError(
                    f"the adapter in {folder!r} does not fit {backbone} at {name}: expected A and B of {expected} for a plain "
                    f"linear, found {[shapes.get(expert.A_key), shapes.get(expert.B_key)]} for a {type(module).__name__}"
                )
            experts[name] = expert
    return Lora(Path(folder), backbone, experts)


def _skeleton(backbone: str) -> PreTrainedModel:
    """The backbone without values."""
    check_backbone(backbone)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(backbone))
