"""LD-MoLE as a PEFT method: `peft.get_peft_model(model, LdMoleConfig(...))`, save_pretrained, from_pretrained.

Importing this module (or `ldmole_dist`) registers the method. The config (`peft_config`) knows nothing of ranks: to spread the
experts, call `spread_experts(model, ExpertParallel(group))` on the bare model before the adapter is injected; only the local
slice of every bank is then allocated, and saving gathers all experts, layer by layer, on all ranks.

Names in an adapter file: `<module>.lora_A` (E, r, D), `.lora_B` (E, O, r), `.router.weight` (E, D), and the shared MLPs
once, `base_model.lambda_mlp.<D>.fc1.weight` and so on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ldmole_dist.method.context import StepContext
from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.layer import InputGroup, MoELinear
from ldmole_dist.method.routers import new_router
from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.parallel.placement import draw_bank, seeded
from ldmole_dist.tuner.config import LdMoleConfig, LdMolePeftType
from ldmole_dist.tuner.input_groups import find_input_groups

EXPERT_TENSORS = ("lora_A", "lora_B")


class LdMoleLinear(MoELinear, BaseTunerLayer):
    """MoELinear as PEFT's machinery sees it."""

    adapter_layer_names = ("lora_A", "lora_B", "router")
    other_param_names = ("lora_dropout", "scaling", "lambda_mlps", "groups")

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active or self.context.plain:
            return self.base_layer(x)
        return self.adapted(x, active[0])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Raises:
            ValueError: on more than one; what two routings over two banks would mean together is not defined.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"LD-MoLE activates one adapter at a time, not {adapter_names}: choose one of them")
        super().set_adapter(adapter_names, inference_mode)


class LdMoleModel(BaseTuner):
    """Injects LD-MoLE adapters; holds the lambda-MLPs, one for each in-feature size and adapter.

    `gather_parameter` turns a parameter that an engine keeps in pieces into the whole local tensor while it is called;
    the engine room sets it under ZeRO-3.
    """

    prefix = "lora_"
    tuner_layer_cls = LdMoleLinear
    uses_shared_state = True
    target_module_mapping: dict[str, list[str]] = {}
    gather_parameter: Callable[[Tensor], Tensor] | None = None

    context: StepContext
    parallel: ExpertParallel
    lambda_mlp: nn.ModuleDict

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.lambda_mlp = nn.ModuleDict()
        self.context = StepContext()
        self.parallel = getattr(model, "expert_parallel", None) or ExpertParallel()
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        # A number of positions, from the end, needs no telling: masks are taken from there anyway.
        positions = given.get("logits_to_keep", given.get("kwargs", {}).get("logits_to_keep"))
        self.context.begin(given.get("attention_mask"), positions if isinstance(positions, Tensor) else None)
        self.context.hidden = self._hidden(model, given) if self.reads_hidden else None

    @property
    def reads_hidden(self) -> bool:
        """Whether routers of the active adapter read the hidden states of another forward (`router_input`)."""
        return any(_ours(self.peft_config[name]).router_input == "hidden" for name in self.active_adapters)

    @torch.no_grad()
    def _hidden(self, model: nn.Module, given: dict[str, Any]) -> Tensor:
        """(B, S, H): the last hidden states of the backbone without adapters."""
        if given.get("past_key_values") is not None or given.get("use_cache", False):
            raise ValueError(
                "router_input='hidden' reads a forward without the adapter, whose keys and values are others than those of the "
                "adapted one: pass use_cache=False"
            )
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        inputs = {name: given[name] for name in names if name in given}
        decoder: Any = model.base_model
        self.context.plain = True
        try:
            hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        finally:
            self.context.plain = False
        return hidden

    def _end(self, *_: Any) -> None:
        self.context.end()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the model's own, for whoever trains it: the recomputation replays the routing of the forward.

        Raises:
            ValueError: on a reentrant checkpoint, which drops the gradient of the auxiliary losses in silence.
        """
        settings = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if settings["use_reentrant"]:
            raise ValueError(
                "use_reentrant=True drops the gradient of the auxiliary losses in silence: leave it out, or set it to False"
            )
        model: Any = self.model
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=settings | {"context_fn": self.context.checkpoint_contexts}, **kwargs
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The former name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, and gives the adapter its lambda-MLPs.

        Raises:
            ValueError: a target that is no plain nn.Linear, or that names no module.
        """
        _check_every_target_matches(model, _ours(self.peft_config[adapter_name]))
        self.lambda_mlp[adapter_name] = nn.ModuleDict()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._group(model, adapter_name)
        self._freeze_experts()
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                _keep_wide(module.modules_to_save[adapter_name])

    def _group(self, model: nn.Module, adapter_name: str) -> None:
        """Let linears that read the same tensor dispatch together."""
        linears = {m.name: m for m in model.modules() if isinstance(m, LdMoleLinear) and adapter_name in m.lora_A}
        for names in find_input_groups(model, linears):
            group = InputGroup([linears[name] for name in names], adapter_name)
            for member in group.members:
                member.groups[adapter_name] = group

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = _ours(peft_config)
        base: Any = target.base_layer if isinstance(target, LdMoleLinear) else target
        if not _is_plain_linear(base):
            dtype = getattr(getattr(base, "weight", None), "dtype", "no weight")
            raise ValueError(
                f"{current_key} is a {type(base).__name__} ({dtype}): LD-MoLE adapts plain floating-point nn.Linear only; "
                "load the backbone without quantisation, or leave it out of target_modules"
            )
        if not isinstance(target, LdMoleLinear):
            target = LdMoleLinear(base, current_key, self.context, self.parallel.dispatch())
            setattr(parent, target_name, target)
        D, O = base.in_features, base.out_features
        weight = base.weight
        like = torch.empty(0, dtype=at_least_float32(weight.dtype), device=weight.device)
        experts = experts_of_linear(self.model, config, current_key)
        placement = self.parallel.placement(experts)
        A, B = draw_bank(placement, config.r, D, O, config.init_seed, current_key, like)
        read = self.model.config.hidden_size if config.router_input == "hidden" else D
        router = new_router(config.router, read, experts, top_k=config.top_k, top_p=config.top_p).to(like)
        router.reset(seeded(config.init_seed, current_key, "router"))
        bank = ExpertBank(nn.Parameter(A), nn.Parameter(B), config.lora_alpha / config.r)
        lambda_mlp = self._lambda_mlp(adapter_name, config, read, like) if router.needs_lambda else None
        target.add_adapter(adapter_name, bank, router, lambda_mlp, config.lora_dropout)

    def _lambda_mlp(self, adapter_name: str, config: LdMoleConfig, in_features: int, like: Tensor) -> LambdaMLP:
        shared: Any = self.lambda_mlp[adapter_name]
        if str(in_features) not in shared:
            mlp = LambdaMLP(in_features, config.lambda_hidden, config.lambda_eps).to(like)
            mlp.reset(seeded(config.init_seed, "lambda_mlp", in_features), config.lambda_init)
            shared[str(in_features)] = mlp
        mlp = shared[str(in_features)]
        assert isinstance(mlp, LambdaMLP)
        return mlp

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; the lambda-MLPs of the other adapters are frozen with them."""
        super().set_adapter(adapter_name, inference_mode)
        for name, mlps in self.lambda_mlp.items():
            mlps.requires_grad_(name in self.active_adapters and not inference_mode)
        self._freeze_experts()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        for name, mlps in self.lambda_mlp.items():
            mlps.requires_grad_(enabled and name in self.active_adapters)
        self._freeze_experts()

    def _freeze_experts(self) -> None:
        """Those of adapters whose experts are not trained, whatever PEFT made of them."""
        for module in self.model.modules():
            if isinstance(module, LdMoleLinear):
                for name in module.lora_A:
                    if not _ours(self.peft_config[name]).train_experts:
                        module.lora_A[name].requires_grad_(False)
                        module.lora_B[name].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, lambda-MLPs included."""
        super().delete_adapter(adapter_name)
        del self.lambda_mlp[adapter_name]

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "LD-MoLE cannot be merged into the base weights: every token has its own mixture of experts, so there is no "
            "single matrix to add; keep the adapter beside the model"
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, found, tail = key.partition(f"lambda_mlp.{adapter_name}.")
        return f"{head}lambda_mlp.{tail}" if found else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]  # PEFT passes everything by name
        cls, *, model: nn.Module, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Whole tensors under every placement; every rank calls it, global rank 0 gets the values, the others empty shells."""
        selected = super()._get_adapter_state_dict(model=model, state_dict=state_dict, **kwargs)
        tuner = tuner_of(model)
        keeps = not dist.is_initialized() or dist.get_rank() == 0
        for key, parameter in model.named_parameters():
            # PEFT takes modules_to_save out of this same dictionary afterwards; under ZeRO-3 it holds empty pieces of them.
            if key in selected or (".modules_to_save." in key and key in state_dict):
                value = tuner.whole_parameter(key, parameter)
                state_dict[key] = value.cpu() if keeps else value.to("meta")
        return {key: state_dict[key] for key in selected}

    def whole_parameter(self, name: str, parameter: Tensor) -> Tensor:
        """The full tensor of a trainable parameter, all E experts of a bank; every rank calls it in the same order.

        Args:
            name: of the parameter in the model.
            parameter: what this rank holds of it.
        """
        value = parameter.detach() if self.gather_parameter is None else self.gather_parameter(parameter)
        return self.parallel.gathered(value) if is_expert_tensor(name) else value

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        parallel = tuner_of(model).parallel
        banks = _check_fits(model, _ours(config), adapter_name, remapped)
        return {
            key: value[parallel.placement(len(value)).local] if key in banks else value
            for key, value in remapped.items()
        }


def spread_experts(model: nn.Module, parallel: ExpertParallel) -> None:
    """Spread the experts of adapters that are injected into this bare model from now on over a group of ranks."""
    carrier: Any = model
    carrier.expert_parallel = parallel


def tuner_of(model: nn.Module) -> LdMoleModel:
    """The tuner inside a PEFT model: its step context, its expert-parallel group, its lambda-MLPs."""
    tuner = model.base_model
    assert isinstance(tuner, LdMoleModel), f"{type(tuner).__name__} holds no LD-MoLE adapter"
    return tuner


def is_expert_tensor(name: str) -> bool:
    """Whether a parameter (by its name) is a bank of experts, held in slices under expert parallelism."""
    return any(f".{tensor}." in name or name.endswith(f".{tensor}") for tensor in EXPERT_TENSORS)


def experts_of_linear(model: nn.Module, config: LdMoleConfig, name: str) -> int:
    """E of an adapted linear.

    Args:
        model: the backbone.
        config: of the adapter; several numbers of experts are each for an equal stretch of the decoder layers.
        name: of the linear in the backbone; the first whole number in it is its layer.

    Raises:
        ValueError: where there are several numbers, and the linear is in no numbered layer or the layers are fewer.
    """
    counts = config.expert_counts
    if len(counts) == 1:
        return counts[0]
    layered = re.match(r"(.+?)\.(\d+)\.", name)
    if layered is None:
        raise ValueError(
            f"num_experts={counts} goes by layer, and {name} is in none: give one number for all linears, or leave it out of "
            "target_modules"
        )
    layers: Any = model.get_submodule(layered[1])
    if len(layers) < len(counts):
        raise ValueError(
            f"num_experts={counts} has {len(counts)} numbers, and {layered[1]} only {len(layers)} layers: give at most one each"
        )
    return counts[int(layered[2]) * len(counts) // len(layers)]


def _check_fits(model: nn.Module, config: LdMoleConfig, adapter_name: str, loaded: dict[str, Tensor]) -> set[str]:
    """The expert tensors among the loaded ones. Raises ValueError where the adapter belongs to another backbone."""
    mine, parallel = _adapter_parameters(model, adapter_name), tuner_of(model).parallel
    experts = {name for name in mine if is_expert_tensor(name)}
    for name, parameter in mine.items():
        shape = tuple(parameter.shape)
        if name in experts:
            shape = (shape[0] * parallel.size, *shape[1:])
        if name not in loaded or tuple(loaded[name].shape) != shape:
            found = tuple(loaded[name].shape) if name in loaded else "nothing"
            raise ValueError(
                f"this adapter was made for another backbone ({config.base_model_name_or_path}): "
                f"{name} needs {shape}, the adapter has {found}; load it on the backbone that it was trained on"
            )
    if unexpected := sorted(set(loaded) - set(mine) - {name for name, _ in model.named_parameters()}):
        raise ValueError(
            f"this adapter was made for another backbone ({config.base_model_name_or_path}): it has {unexpected[0]}, "
            "which this model does not; load it on the backbone that it was trained on"
        )
    return experts


def _adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The parameters that belong to an adapter."""
    return {
        f"{path}.{holder}.{name}": parameter for path, holder, name, parameter in _held_parameters(model, adapter_name)
    }


def _held_parameters(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, str, nn.Parameter]]:
    """(module, its attribute, name in that, parameter) of what belongs to an adapter, found by what holds it: the adapter's
    name may also be that of a module."""
    holders: dict[type[nn.Module], tuple[str, ...]] = {
        LdMoleLinear: ("lora_A", "lora_B", "router"),
        LdMoleModel: ("lambda_mlp",),
        ModulesToSaveWrapper: ("modules_to_save",),
    }
    for path, module in model.named_modules():
        for holder in holders.get(type(module), ()):
            for name, parameter in getattr(module, holder).named_parameters():
                if name.partition(".")[0] == adapter_name:
                    yield path, holder, name, parameter


def adapter_keys(model: nn.Module) -> dict[str, str]:
    """Parameter name in a PEFT model -> name in an adapter file, of everything that belongs to the active adapter."""
    (adapter,) = tuner_of(model).active_adapters
    keys = {}
    for path, holder, name, _ in _held_parameters(model, adapter):
        # modules_to_save goes by the name of the module that it stands in for.
        where = path if holder == "modules_to_save" else f"{path}.{holder}"
        keys[f"{path}.{holder}.{name}"] = where + name.removeprefix(adapter)
    return keys


def _check_every_target_matches(model: nn.Module, config: LdMoleConfig) -> None:
    if isinstance(config.target_modules, str) or config.target_modules is None:
        return
    modules = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
    unmatched = [t for t in config.target_modules if not any(f".{name}".endswith(f".{t}") for name in modules)]
    if unmatched:
        linears = {name.rsplit(".", 1)[-1] for name, module in modules.items() if _is_plain_linear(module)}
        raise ValueError(
            f"target_modules {sorted(unmatched)} name no module of this model; its linears are called {sorted(linears)}"
        )


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.is_floating_point()


def _keep_wide(module: nn.Module) -> None:
    """A module trained in full keeps at least float32 parameters, as all trainable ones do, and takes any input."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(at_least_float32(parameter.dtype))

    def widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    module.register_forward_pre_hook(widen)


def _ours(config: PeftConfig) -> LdMoleConfig:
    assert isinstance(config, LdMoleConfig)
    return config


def _register() -> None:
    # PEFT refuses names outside its own enumeration (register_peft_method); the tables themselves take any key.
    tables: list[tuple[Any, Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, LdMoleConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, LdMoleModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, LdMoleModel.prefix),
    ]
    for table, entry in tables:
        table[LdMolePeftType.LDMOLE] = entry


_register()
