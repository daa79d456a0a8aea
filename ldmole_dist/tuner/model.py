"""LD-MoLE as a PEFT method: `peft.get_peft_model(model, LdMoleConfig(...))`, `save_pretrained`, `from_pretrained`.

A config does not depend on the number of ranks. To spread the experts over ranks, call
`spread_experts(model, ExpertParallel(group))` on the bare model before the adapter is injected: each rank then allocates only
its own experts. Saving gathers all experts, one tensor at a time, so every rank must take part in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ldmole_dist.method.context import StepContext
from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.layer import InputGroup
from ldmole_dist.method.routers import new_router
from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.parallel.placement import draw_bank, seeded
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.input_groups import find_input_groups
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.quantized import keep_gradients, stored_weight
from ldmole_dist.tuner.state_dict import check_adapter_fits, is_expert_tensor
from ldmole_dist.tuner.targets import check_targets_exist, experts_of_linear, features_of, why_not_adaptable


class LdMoleModel(BaseTuner):
    """Tuner that injects LD-MoLE adapters and holds their lambda-MLPs, one per input size and adapter.

    Attributes:
        context: state of the current forward, shared by all adapted linears.
        parallel: expert-parallel group that the experts are spread over.
        lambda_mlp: lambda-MLPs, by adapter name and then by input size.
        gather_parameter: function that returns the full tensor of a parameter of which this rank holds a shard; set under
            ZeRO-3, None otherwise.
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
        model.register_forward_hook(self._end, always_call=True)
        keep_gradients(model)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        # transformers' logits_to_keep is a tensor of positions, or a number of positions at the end. The context aligns masks
        # to the end of the sequence anyway, so only a tensor is passed to it.
        positions = given.get("logits_to_keep")
        self.context.begin(
            given.get("attention_mask"),
            positions if isinstance(positions, Tensor) else None,
            given.get("decoder_attention_mask"),
            self._hidden(model, given) if self.reads_hidden else None,
        )

    @property
    def reads_hidden(self) -> bool:
        """Whether the active adapter routes on the backbone's last hidden states (`router_input='hidden'`)."""
        return any(_ldmole(self.peft_config[name]).router_input == "hidden" for name in self.active_adapters)

    @torch.no_grad()
    def _hidden(self, model: nn.Module, given: dict[str, Any]) -> Tensor:
        """Return the last hidden states of the backbone without adapters, (sequences, positions, hidden size)."""
        if given.get("past_key_values") is not None or given.get("use_cache", False):
            raise ValueError(
                "router_input='hidden' does not support a key-value cache: it first runs the backbone without the adapter, and "
                "the keys and values of that forward differ from those with the adapter; pass use_cache=False and no "
                "past_key_values"
            )
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        inputs = {name: given[name] for name in names if name in given}
        decoder: Any = model.base_model
        self.context.adapter_disabled = True
        try:
            hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        finally:
            self.context.adapter_disabled = False
        return hidden

    def _end(self, *_: Any) -> None:
        self.context.end()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable the model's activation checkpointing, with a recomputation that replays the routing of the forward.

        Raises:
            ValueError: if `use_reentrant` is True, which would silently drop the gradient of the auxiliary losses.
        """
        settings = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if settings["use_reentrant"]:
            raise ValueError(
                "use_reentrant=True silently drops the gradient of the auxiliary losses; remove it, or set it to False"
            )
        model: Any = self.model
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=settings | {"context_fn": self.context.checkpoint_contexts}, **kwargs
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Call `activation_checkpointing_enable`. This is its name in earlier versions of transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Replace the target linears, create the adapter's lambda-MLPs and group the linears by input.

        The trainable copies of modules_to_save are converted to at least float32.

        Raises:
            ValueError: if a target cannot be adapted (`targets.why_not_adaptable`), if an entry of `target_modules` matches no
                module, or if `num_experts` does not fit the decoder layers or the number of ranks that hold experts.
        """
        check_targets_exist(model, _ldmole(self.peft_config[adapter_name]))
        self.lambda_mlp[adapter_name] = nn.ModuleDict()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._group(model, adapter_name)
        self._freeze_experts()
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                _keep_at_least_float32(module.modules_to_save[adapter_name])

    def _group(self, model: nn.Module, adapter_name: str) -> None:
        """Put linears that read the same tensor in one `InputGroup`, so that one dispatch serves all of them."""
        linears = {m.name: m for m in model.modules() if isinstance(m, LdMoleLinear) and adapter_name in m.lora_A}
        for names, mask_names in find_input_groups(model, linears):
            group = InputGroup([linears[name] for name in names], adapter_name)
            for member, mask_name in zip(group.linears, mask_names, strict=True):
                member.groups[adapter_name], member.mask_name = group, mask_name

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
        config = _ldmole(peft_config)
        base: Any = target.base_layer if isinstance(target, LdMoleLinear) else target
        if reason := why_not_adaptable(base):
            raise ValueError(f"LD-MoLE cannot adapt {current_key}: this {type(base).__name__} {reason}")
        if not isinstance(target, LdMoleLinear):
            target = LdMoleLinear(base, current_key, self.context, self.parallel.dispatch())
            setattr(parent, target_name, target)
        D, O = features_of(base)
        weight = stored_weight(base)
        like = torch.empty(0, dtype=at_least_float32(weight.dtype), device=weight.device)
        experts = experts_of_linear(self.model, config, current_key)
        placement = self.parallel.placement(experts)
        A, B = draw_bank(placement, config.r, D, O, config.init_seed, current_key, like)
        router_in = self.model.config.hidden_size if config.router_input == "hidden" else D
        router = new_router(config.router, router_in, experts, top_k=config.top_k, top_p=config.top_p).to(like)
        router.reset(seeded(config.init_seed, current_key, "router"))
        bank = ExpertBank(nn.Parameter(A), nn.Parameter(B), config.lora_alpha / config.r)
        lambda_mlp = self._lambda_mlp(adapter_name, config, router_in, like) if router.needs_lambda else None
        target.add_adapter(adapter_name, bank, router, lambda_mlp, config.lora_dropout)

    def _lambda_mlp(self, adapter_name: str, config: LdMoleConfig, in_features: int, like: Tensor) -> LambdaMLP:
        """Return the adapter's lambda-MLP for inputs of size `in_features`; create it on first use."""
        shared: Any = self.lambda_mlp[adapter_name]
        if str(in_features) not in shared:
            mlp = LambdaMLP(in_features, config.lambda_hidden, config.lambda_eps).to(like)
            mlp.reset(seeded(config.init_seed, "lambda_mlp", in_features), config.lambda_init)
            shared[str(in_features)] = mlp
        mlp = shared[str(in_features)]
        assert isinstance(mlp, LambdaMLP)
        return mlp

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter and freeze all others, including their lambda-MLPs; `inference_mode` freezes all adapters."""
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
        """Freeze the experts of adapters with `train_experts=False`; PEFT makes every active adapter trainable."""
        for module in self.model.modules():
            if isinstance(module, LdMoleLinear):
                for name in module.lora_A:
                    if not _ldmole(self.peft_config[name]).train_experts:
                        module.lora_A[name].requires_grad_(False)
                        module.lora_B[name].requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its lambda-MLPs."""
        super().delete_adapter(adapter_name)
        del self.lambda_mlp[adapter_name]

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "LD-MoLE cannot be merged into the base weights, because each token has its own mixture of experts; keep the "
            "adapter separate from the backbone"
        )

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        head, found, tail = key.partition(f"lambda_mlp.{adapter_name}.")
        return f"{head}lambda_mlp.{tail}" if found else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]  # PEFT passes every argument by name
        cls, *, model: nn.Module, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return full tensors on global rank 0, and meta tensors on the others. Collective: every rank must call it."""
        selected = super()._get_adapter_state_dict(model=model, state_dict=state_dict, **kwargs)
        tuner = tuner_of(model)
        keeps = not dist.is_initialized() or dist.get_rank() == 0
        for key, parameter in model.named_parameters():
            # PEFT reads modules_to_save from `state_dict` after this call; under ZeRO-3 the entries there are empty.
            if key in selected or (".modules_to_save." in key and key in state_dict):
                value = tuner.full_parameter(key, parameter)
                state_dict[key] = value.cpu() if keeps else value.to("meta")
        return {key: state_dict[key] for key in selected}

    def full_parameter(self, name: str, parameter: Tensor) -> Tensor:
        """Return the full tensor of a parameter of an adapter. If it holds experts, those of all ranks are included.

        Collective: every rank must call it, for the same parameters in the same order.

        Args:
            name: name of the parameter in the model.
            parameter: the parameter as this rank holds it, possibly a shard.
        """
        value = parameter.detach() if self.gather_parameter is None else self.gather_parameter(parameter)
        return self.parallel.all_gather(value) if is_expert_tensor(name) else value

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename the keys of an adapter file to those of the model, check the tensors, and slice out the experts of this rank.

        Raises:
            ValueError: if the tensors do not match the parameters of the model (`check_adapter_fits`).
        """
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        parallel = tuner_of(model).parallel
        experts = check_adapter_fits(model, _ldmole(config), adapter_name, remapped, parallel.size)
        return {
            key: value[parallel.placement(len(value)).local] if key in experts else value
            for key, value in remapped.items()
        }


def spread_experts(model: nn.Module, parallel: ExpertParallel) -> None:
    """Set the ranks that the experts of a model are spread over.

    Args:
        model: model without adapters. Adapters that are injected later hold only the experts of this rank.
        parallel: expert-parallel group.
    """
    carrier: Any = model
    carrier.expert_parallel = parallel


def tuner_of(model: nn.Module) -> LdMoleModel:
    """Return the `LdMoleModel` inside a PEFT model; it has the step context and the expert-parallel group of the model.

    Args:
        model: PEFT model with an LD-MoLE adapter, from `peft.get_peft_model` or `PeftModel.from_pretrained`.
    """
    tuner = model.base_model
    assert isinstance(tuner, LdMoleModel), f"{type(tuner).__name__} has no LD-MoLE adapter; inject one first"
    return tuner


def _keep_at_least_float32(module: nn.Module) -> None:
    """Convert the parameters of a `modules_to_save` module to at least float32.

    Also register a hook that casts the floating-point inputs of each forward to the dtype of the parameters.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(at_least_float32(parameter.dtype))

    def cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    module.register_forward_pre_hook(cast_inputs)


def _ldmole(config: PeftConfig) -> LdMoleConfig:
    """Narrow the type of a config; PEFT types the configs of a tuner as `PeftConfig`."""
    assert isinstance(config, LdMoleConfig)
    return config
