"""LD-MoLE adapter whose experts are existing LoRA adapters; only its routers and lambda-MLPs remain to be trained.

Expert e of a linear is s_e B_e A_e, with the matrices B_e and A_e and the scaling s_e of the e-th LoRA adapter. The
expert is zero if that adapter does not adapt the linear. Smaller LoRA ranks are padded with zeros, which does not change the
product.

Shapes: E experts, R LoRA rank, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ldmole_dist.checkpoint.export import METADATA
from ldmole_dist.checkpoint.files import TensorSpec, write_tensors
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_folder, write_errors
from ldmole_dist.model.backbone import check_backbone, new_adapter
from ldmole_dist.parallel.placement import seeded
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of
from ldmole_dist.tuner.state_dict import adapter_keys


class Expert(NamedTuple):
    """Location of the weights of one LoRA adapter for one linear, and their scaling.

    Args:
        A_key: key of A (R, D) in the file of the adapter.
        B_key: key of B (O, R) in the file of the adapter.
        r: LoRA rank R.
        scaling: factor by which the product B A is scaled.
    """

    A_key: str
    B_key: str
    r: int
    scaling: float


class LoraAdapter(NamedTuple):
    """LoRA adapter that becomes one expert of each adapted linear.

    Args:
        folder: folder of the adapter.
        backbone: path of the backbone.
        experts: expert of each adapted linear, by the linear's name in the backbone.
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
    """Write an LD-MoLE adapter composed of LoRA adapters.

    To limit the memory, the stacked tensors (A or B of all experts of one linear) are created and written one at a time.

    Args:
        output: folder to create.
        adapters: folders of LoRA adapters.
        backbone: path of the backbone; None uses the one that all adapters' configs name.
        router: router of the new adapter (`LdMoleConfig.router`).
        top_k: active experts per token of the router "topk" (`LdMoleConfig.top_k`).
        router_input: input of the routers (`LdMoleConfig.router_input`).

    Returns:
        Config of the new adapter.

    Raises:
        UserError: if an adapter cannot be an expert, `backbone` is None and the adapters name none or different ones, the
            backbone cannot be loaded, an argument of the router is invalid, or `output` exists or cannot be written.
    """
    folder = Path(output)
    if folder.exists():
        raise UserError(f"{output} already exists; remove it or choose another folder.")
    path = backbone or _load_config(adapters[0]).base_model_name_or_path
    if not path:
        raise UserError(f"the config of the adapter {adapters[0]} names no backbone; set --backbone.")
    loras = [_load_lora(name, path, explicit=backbone is not None) for name in adapters]
    linear_names = list(dict.fromkeys(name for lora in loras for name in lora.experts))
    r = max(expert.r for lora in loras for expert in lora.experts.values())
    try:
        config = LdMoleConfig(
            r=r,
            lora_alpha=r,  # scaling 1: each expert's own scaling is multiplied into its B
            lora_dropout=0.0,
            num_experts=len(loras),
            target_modules=linear_names,
            router=router,  # type: ignore[arg-type]  # checked by LdMoleConfig
            top_k=top_k,
            router_input=router_input,  # type: ignore[arg-type]
            train_experts=False,
            task_type="CAUSAL_LM",
            base_model_name_or_path=path,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    model: Any = new_adapter(_meta_backbone(path), config)
    keys = adapter_keys(model)
    linears = {module.name: module for module in model.modules() if isinstance(module, LdMoleLinear)}
    expert_parameters: dict[str, tuple[str, str]] = {}  # name of a parameter -> (linear, "A" or "B")
    for linear_path, module in model.named_modules():
        if isinstance(module, LdMoleLinear):
            expert_parameters |= {
                f"{linear_path}.ldmole_adapters.default.lora_A": (module.name, "A"),
                f"{linear_path}.ldmole_adapters.default.lora_B": (module.name, "B"),
            }
    _initialize_routers(model, linears, config)
    parameters = dict(model.named_parameters())
    entries = [TensorSpec(key, tuple(parameters[name].shape), torch.float32) for name, key in keys.items()]
    with write_errors(f"the adapter {folder}"), atomic_folder(folder) as unfinished:
        config.inference_mode = True
        config.save_pretrained(str(unfinished))
        values = (
            _stack_experts(loras, *expert_parameters[name], parameters[name])
            if name in expert_parameters
            else parameters[name].detach()
            for name in keys
        )
        write_tensors(unfinished / SAFETENSORS_WEIGHTS_NAME, entries, values, METADATA)
    return config


def _initialize_routers(model: Any, linears: dict[str, LdMoleLinear], config: LdMoleConfig) -> None:
    """Move routers and lambda-MLPs from the meta device to the CPU, with the initial values of a new adapter."""
    for name, linear in linears.items():
        adapter: Any = linear.ldmole_adapters["default"]
        adapter.router.to_empty(device="cpu").reset(seeded(config.init_seed, name, "router"))
    for in_features, mlp in tuner_of(model).ldmole_lambda_mlp["default"].items():  # type: ignore[operator, union-attr]
        mlp.to_empty(device="cpu").reset(seeded(config.init_seed, "lambda_mlp", int(in_features)), config.lambda_init)


def _stack_experts(loras: Sequence[LoraAdapter], linear: str, part: str, like: Tensor) -> Tensor:
    """Return the A or B matrices of all experts of one linear, stacked in float32.

    Args:
        loras: LoRA adapters, one per expert.
        linear: name of the linear in the backbone.
        part: "A", or "B" for the B matrices multiplied by the scaling of their adapters.
        like: tensor with the shape of the result.

    Returns:
        (E, R, D) for "A", (E, O, R) for "B"; zero where an adapter does not adapt the linear or has a smaller LoRA rank.
    """
    stacked = torch.zeros(like.shape)
    for index, lora in enumerate(loras):
        if (expert := lora.experts.get(linear)) is not None:
            with safe_open(lora.folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
                if part == "A":
                    stacked[index, : expert.r] = file.get_tensor(expert.A_key).float()
                else:
                    stacked[index, :, : expert.r] = file.get_tensor(expert.B_key).float() * expert.scaling
    return stacked


def _load_config(folder: str) -> LoraConfig:
    """Return the config of the adapter in a folder. Raise UserError if it cannot be read or the adapter is not LoRA."""
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        if (Path(folder) / CONFIG_NAME).is_file():
            problem = (
                f"{error}; correct its {CONFIG_NAME}, or save the adapter again with the installed version of PEFT."
            )
        else:
            problem = f"it has no {CONFIG_NAME}; give the folder of a LoRA adapter saved with PEFT."
        raise UserError(f"cannot read an adapter from {folder!r}: {problem}") from error
    if type(config) is not LoraConfig:
        raise UserError(
            f"the adapter {folder!r} is of type {config.peft_type}, but only LoRA adapters can be experts; remove this adapter "
            "from the command."
        )
    return config


def _load_lora(folder: str, backbone: str, explicit: bool) -> LoraAdapter:
    """Check a LoRA adapter against its backbone and return where its weights are, without reading the weights.

    Args:
        folder: folder of the adapter.
        backbone: path of the backbone.
        explicit: whether the user set the backbone; if not, the adapter's config must name `backbone`.

    Raises:
        UserError: if the adapter cannot be read, is not plain LoRA, adapts a module other than nn.Linear, names another
            backbone or does not match the backbone, or if the backbone cannot be loaded.
    """
    config = _load_config(folder)
    unsupported = {
        "DoRA": config.use_dora,
        f"bias={config.bias!r}": config.bias != "none",
        "lora_bias": config.lora_bias,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
    }
    if found := [name for name, value in unsupported.items() if value]:
        raise UserError(
            f"the adapter {folder!r} uses {', '.join(found)}, but only plain LoRA can be an expert; remove this adapter "
            "from the command."
        )
    if not explicit and config.base_model_name_or_path != backbone:
        raise UserError(
            f"the adapter {folder!r} is for {config.base_model_name_or_path}, but the first adapter is for {backbone}; use "
            "adapters of one backbone, or set --backbone if both are paths of the same one."
        )
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"the adapter {folder!r} has no {SAFETENSORS_WEIGHTS_NAME}; restore it, or save it with PEFT.")
    try:
        with safe_open(path, "pt") as file:
            # safe_open objects are not iterable.
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); check that the adapter is complete and readable.") from error
    # PEFT resolves rank and alpha patterns, layer selection and rank-stabilized scaling when it builds the adapter.
    config.init_lora_weights = False
    model: Any = get_peft_model(_meta_backbone(backbone), config)
    experts = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            expert = Expert(
                f"base_model.model.{name}.lora_A.weight",
                f"base_model.model.{name}.lora_B.weight",
                module.r["default"],
                module.scaling["default"],
            )
            is_plain_linear = type(module) is LoraLinear and not getattr(module, "fan_in_fan_out", False)
            expected = [[expert.r, module.in_features], [module.out_features, expert.r]]
            actual = [shapes.get(expert.A_key), shapes.get(expert.B_key)]
            if not is_plain_linear:
                raise UserError(
                    f"the adapter {folder!r} adapts {name}, a {type(module.get_base_layer()).__name__}, but experts can adapt "
                    "only nn.Linear; remove this adapter from the command."
                )
            if None in actual:
                raise UserError(
                    f"the adapter {folder!r} does not match {backbone} at {name}: its file lacks A or B of this linear; "
                    "restore the file, or use the backbone that the adapter was trained on."
                )
            if actual != expected:
                raise UserError(
                    f"the adapter {folder!r} does not match {backbone} at {name}: A and B have the shapes {actual[0]} and "
                    f"{actual[1]}, not {expected[0]} and {expected[1]}; use the backbone that the adapter was trained on."
                )
            experts[name] = expert
    if unused := sorted(shapes.keys() - {key for expert in experts.values() for key in (expert.A_key, expert.B_key)}):
        raise UserError(
            f"the file of the adapter {folder!r} holds {unused[0]}, which is not part of a linear that its config adapts; only "
            "linears can be adapted by experts: remove this adapter from the command, or restore its config."
        )
    return LoraAdapter(Path(folder), backbone, experts)


def _meta_backbone(backbone: str) -> PreTrainedModel:
    """Return the backbone on the meta device, without weights. Raise UserError if it cannot be loaded."""
    check_backbone(backbone)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(backbone))
