"""The parameters of an adapter: their names in the model and in an adapter file, and a check of loaded tensors.

Names in an adapter file: `<module>.lora_A` (E, R, D), `<module>.lora_B` (E, O, R), `<module>.router.weight` (E, D) and, once
per input size D, the parameters of the shared lambda-MLP, such as `base_model.lambda_mlp.<D>.fc1.weight`. <module> is a linear,
or a projection of routed experts, such as `mlp.experts.gate_up_proj`. The parameters of modules_to_save are stored under the
names of the modules that they replace.

Shapes: E experts, R LoRA rank, D in-features (the hidden size for routers with router_input='hidden'), O out-features.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

EXPERT_TENSORS = ("lora_A", "lora_B")

# Attributes that hold adapters by name -> what replaces "<attribute>.<adapter>." of a parameter's name in an adapter file. PEFT
# saves modules_to_save under the names of the modules that they replace.
HOLDERS = {"ldmole_adapters": "", "ldmole_lambda_mlp": "lambda_mlp.", "modules_to_save": ""}


def is_expert_tensor(name: str) -> bool:
    """Return whether the parameter `name` holds experts, which expert parallelism splits along dimension 0."""
    return any(f".{tensor}." in name or name.endswith(f".{tensor}") for tensor in EXPERT_TENSORS)


def saved_key(name: str, adapter_name: str) -> str | None:
    """Return the name in an adapter file of the parameter `name`; None if it does not belong to the adapter."""
    for holder, saved in HOLDERS.items():
        head, found, tail = name.partition(f".{holder}.{adapter_name}.")
        if found:
            return f"{head}.{saved}{tail}"
    return None


def adapter_keys(model: nn.Module) -> dict[str, str]:
    """Return the name in an adapter file of each parameter of the active adapter, by its name in the PEFT model."""
    tuner: Any = model.base_model
    (adapter,) = tuner.active_adapters
    keys = {name: saved_key(name, adapter) for name, _ in model.named_parameters()}
    return {name: key for name, key in keys.items() if key is not None}


def check_adapter_fits(
    model: nn.Module, config: PeftConfig, adapter_name: str, loaded: dict[str, Tensor], ep_size: int
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
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied embeddings are saved under each name
    expected = {name: parameter for name, parameter in parameters.items() if saved_key(name, adapter_name) is not None}
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
    if unexpected := sorted(set(loaded) - parameters.keys()):
        raise ValueError(_mismatch(config, f"the adapter has {unexpected[0]}, but this model does not"))
    return experts


def _mismatch(config: PeftConfig, difference: str) -> str:
    return (
        f"this adapter was made for another backbone ({config.base_model_name_or_path}), or its file is incomplete or damaged: "
        f"{difference}; load the adapter on the backbone that it was trained on, or copy it again"
    )
