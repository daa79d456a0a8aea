"""The parameters of an adapter: their names in the model and in an adapter file, and a check of loaded tensors.

Names in an adapter file: `<module>.lora_A` (E, R, D), `<module>.lora_B` (E, O, R), `<module>.router.weight` (E, D) and, once
per input size D, the parameters of the shared lambda-MLP, such as `base_model.lambda_mlp.<D>.fc1.weight`. The parameters of
modules_to_save are stored under the names of the modules that they replace.

Shapes: E experts, R LoRA rank, D in-features (the hidden size for routers with router_input='hidden'), O out-features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.layer import LdMoleLinear

EXPERT_TENSORS = ("lora_A", "lora_B")


def is_expert_tensor(name: str) -> bool:
    """Return whether the parameter `name` holds experts, which expert parallelism splits along dimension 0."""
    return any(f".{tensor}." in name or name.endswith(f".{tensor}") for tensor in EXPERT_TENSORS)


def adapter_keys(model: nn.Module) -> dict[str, str]:
    """Return the name in an adapter file of each parameter of the active adapter, by its name in the PEFT model."""
    tuner: Any = model.base_model
    (adapter,) = tuner.active_adapters
    keys = {}
    for path, holder, name, _ in _adapter_parameters(model, adapter):
        # PEFT saves modules_to_save under the name of the module that the wrapper replaces.
        where = path if holder == "modules_to_save" else f"{path}.{holder}"
        keys[f"{path}.{holder}.{name}"] = where + name.removeprefix(adapter)
    return keys


def check_adapter_fits(
    model: nn.Module, config: LdMoleConfig, adapter_name: str, loaded: dict[str, Tensor], ep_size: int
) -> set[str]:
    """Check that the tensors of an adapter file match the parameters of the model.

    Args:
        model: PEFT model with the adapter injected.
        config: config of the adapter.
        adapter_name: name of the adapter in the model.
        loaded: tensors of the adapter file, with all E experts, by parameter name in the model.
        ep_size: number of ranks that the experts of the model are spread over.

    Returns:
        The names of the expert tensors in `loaded`.

    Raises:
        ValueError: if a tensor is missing, has another shape, or belongs to no parameter.
    """
    expected = {
        f"{path}.{holder}.{name}": parameter
        for path, holder, name, parameter in _adapter_parameters(model, adapter_name)
    }
    experts = {name for name in expected if is_expert_tensor(name)}
    for name, parameter in expected.items():
        shape = list(parameter.shape)
        if name in experts:
            shape[0] *= ep_size
        if name not in loaded or list(loaded[name].shape) != shape:
            found = f"it has shape {list(loaded[name].shape)}" if name in loaded else "it is missing"
            raise ValueError(
                _mismatch(config, f"this model needs {name} with shape {shape}, but in the adapter {found}")
            )
    if unexpected := sorted(set(loaded) - set(expected) - {name for name, _ in model.named_parameters()}):
        raise ValueError(_mismatch(config, f"the adapter has {unexpected[0]}, but this model does not"))
    return experts


def _mismatch(config: LdMoleConfig, difference: str) -> str:
    return (
        f"this adapter was made for another backbone ({config.base_model_name_or_path}), or its file is incomplete or damaged: "
        f"{difference}; load the adapter on the backbone that it was trained on, or copy it again"
    )


def _adapter_parameters(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, str, nn.Parameter]]:
    """Yield (module name, attribute of the module, parameter name below the attribute, parameter) for an adapter.

    Parameters are found by the container that holds them, not by their full name, because an adapter may have the same name
    as a module of the backbone.
    """
    for path, module in model.named_modules():
        for holder in _holders(module):
            for name, parameter in getattr(module, holder).named_parameters():
                if name.partition(".")[0] == adapter_name:
                    yield path, holder, name, parameter


def _holders(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, LdMoleLinear):
        return ("lora_A", "lora_B", "router")
    if isinstance(module, BaseTuner):
        return ("lambda_mlp",)
    return ("modules_to_save",) if isinstance(module, ModulesToSaveWrapper) else ()
