"""LD-MoLE as a PEFT method: `peft.get_peft_model(model, LdMoleConfig(...))`, `save_pretrained`, `from_pretrained`.

A config does not depend on the number of ranks. To spread the experts over ranks, call
`spread_experts(model, ExpertParallel(group))` on the bare model before the adapter is injected: each rank then allocates only
its own experts. Saving gathers all experts, one tensor at a time, so every rank must take part in it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import init_empty_weights
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.layer import InputGroup
from ldmole_dist.method.routers import new_router
from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.parallel.placement import draw_bank, seeded
from ldmole_dist.tuner.bypassed import is_bypassed
from ldmole_dist.tuner.config import LdMoleConfig, narrowed
from ldmole_dist.tuner.expert_targets import expert_targets, warn_if_experts_left_out
from ldmole_dist.tuner.experts import LdMoleExperts
from ldmole_dist.tuner.forward import AdapterForward
from ldmole_dist.tuner.input_groups import find_input_groups
from ldmole_dist.tuner.layer import LdMoleLayer, LdMoleLinear
from ldmole_dist.tuner.modules_to_save import check_not_quantized, is_head, train_in_float32
from ldmole_dist.tuner.quantized import keep_gradients
from ldmole_dist.tuner.saving import SavedAdapters
from ldmole_dist.tuner.targets import (
    check_patterns_match,
    check_targets_exist,
    default_targets,
    experts_of_linear,
    rank_and_scaling,
    why_not_adaptable,
)
from ldmole_dist.tuner.trainable import TrainableAdapters


class LdMoleModel(AdapterForward, TrainableAdapters, SavedAdapters):
    """Tuner that injects LD-MoLE adapters and holds their lambda-MLPs, one per input size and adapter.

    Its base classes document its attributes.
    """

    prefix = "ldmole_"
    tuner_layer_cls = LdMoleLayer
    uses_shared_state = True
    target_module_mapping: dict[str, list[str]] = {}

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.ldmole_lambda_mlp = nn.ModuleDict()
        self.parallel = getattr(model, "expert_parallel", None) or ExpertParallel()
        self._add_hooks(model)
        keep_gradients(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the target linears and routed experts, create its lambda-MLPs and group the linears by input.

        The trainable copies of modules_to_save are converted to at least float32. Adapters that the model already has are not
        changed, and if an error is raised, the model is as it was before.

        Raises:
            ValueError: if a target cannot be adapted (`targets.why_not_adaptable`, `expert_targets.expert_targets`), if an
                entry of `target_modules`, `target_parameters`, `rank_pattern` or `alpha_pattern` matches nothing, if a
                module of `modules_to_save` is quantized, or if `num_experts` does not fit the decoder layers or the number of
                ranks that hold experts.
        """
        trained = {p: p.requires_grad for p in self.ldmole_lambda_mlp.parameters()}
        self.ldmole_lambda_mlp[adapter_name] = nn.ModuleDict()
        try:
            config = narrowed(self.peft_config[adapter_name])
            check_targets_exist(model, config)
            check_not_quantized(model, config)
            warn_if_experts_left_out(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._group(model, adapter_name)
        except Exception:
            self._remove(adapter_name)
            raise
        finally:
            for parameter, requires_grad in trained.items():
                parameter.requires_grad_(requires_grad)
        for name, module in model.named_modules():
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                train_in_float32(module.modules_to_save[adapter_name], keep_output=is_head(model, name, module))

    def _remove(self, adapter_name: str) -> None:
        """Remove an adapter that was only partly injected."""
        del self.ldmole_lambda_mlp[adapter_name]
        for name, module in list(self.model.named_modules()):
            if isinstance(module, LdMoleLayer):
                if adapter_name in module.ldmole_adapters:
                    module.delete_adapter(adapter_name)
                if not module.ldmole_adapters:
                    parent, _, child = name.rpartition(".")
                    if isinstance(module, LdMoleLinear):
                        setattr(self.model.get_submodule(parent), child, module.base_layer)
                    else:
                        delattr(self.model.get_submodule(parent), child)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, LdMoleExperts) and not module.projections:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, module.base_layer)
        if not self.ldmole_lambda_mlp:
            self._remove_hooks()

    def unload(self) -> nn.Module:
        """Return the backbone without adapters."""
        backbone = super().unload()
        self._remove_hooks()
        return backbone

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = narrowed(peft_config)
        if config.target_modules is None:
            config.target_modules = default_targets(self.model, short=config.layers_to_transform is not None)
        return config

    def _group(self, model: nn.Module, adapter_name: str) -> None:
        """Put linears that read the same tensor in one `InputGroup`, so that one dispatch serves all, and set their masks."""
        config = narrowed(self.peft_config[adapter_name])
        check_patterns_match(config, [layer.name for layer in self.adapted_layers(adapter_name)])
        linears = {layer.name: layer for layer in self.adapted_layers(adapter_name) if isinstance(layer, LdMoleLinear)}
        experts = {m.name: m for m in model.modules() if isinstance(m, LdMoleExperts)}
        for names, mask_names in find_input_groups(model, [*linears, *experts]):
            group = InputGroup([linears[name] for name in names if name in linears], adapter_name)
            for name, mask_name in zip(names, mask_names, strict=True):
                if name in linears:
                    linears[name].groups[adapter_name], linears[name].mask_name = group, mask_name
                else:
                    experts[name].set_mask(mask_name)

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
        config = narrowed(peft_config)
        base: Any = target.base_layer if isinstance(target, LdMoleLinear) else target
        if reason := why_not_adaptable(base):
            raise ValueError(f"LD-MoLE cannot adapt {current_key}: this {type(base).__name__} {reason}")
        if is_bypassed(parent, target_name):
            raise ValueError(
                f"LD-MoLE cannot adapt {current_key}: {type(parent).__name__} may take its weight instead of calling it, so "
                f"that the adapter would be skipped; add {target_name!r} to exclude_modules"
            )
        if not isinstance(target, LdMoleLinear):
            target = LdMoleLinear(base, current_key, self.context, self.parallel.dispatch())
            setattr(parent, target_name, target)
        self._add_adapter(config, adapter_name, target)

    def _inject_parameters(
        self, peft_config: PeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        config, names = narrowed(peft_config), []
        for target in list(expert_targets(model, config)):
            parent, experts, child = _get_submodules(model, target.module)
            if not isinstance(experts, LdMoleExperts):
                experts = LdMoleExperts(experts, target.module, self.context, self.parallel.dispatch)
                setattr(parent, child, experts)
            projection = experts.projection(target.projection, target.in_features, target.out_features)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._add_adapter(config, adapter_name, projection)
            names.append(projection.name)
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT calls this to unload a layer, and copies the `weight` of the old module, which experts do not have.
        if isinstance(child, LdMoleExperts):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _add_adapter(self, config: LdMoleConfig, adapter_name: str, target: LdMoleLayer) -> None:
        name, D, O = target.name, target.in_features, target.out_features
        like = _parameter_like(target.frozen_weight)
        experts = experts_of_linear(self.model, config, name)
        r, scaling = rank_and_scaling(config, name)
        placement = self.parallel.placement(experts)
        A, B = draw_bank(placement, r, D, O, config.init_seed, name, like, zero_B=config.init_weights)
        router_in = self.model.config.hidden_size if config.router_input == "hidden" else D
        router = new_router(config.router, router_in, experts, top_k=config.top_k, top_p=config.top_p).to(like)
        router.reset(seeded(config.init_seed, name, "router"))
        bank = ExpertBank(nn.Parameter(A), nn.Parameter(B), scaling)
        lambda_mlp = self._lambda_mlp(adapter_name, config, router_in, like) if router.needs_lambda else None
        adapter = target.add_adapter(adapter_name, bank, router, lambda_mlp, config.lora_dropout)
        adapter.train_experts = config.train_experts

    def _lambda_mlp(self, adapter_name: str, config: LdMoleConfig, in_features: int, like: Tensor) -> LambdaMLP:
        """Return the adapter's lambda-MLP for inputs of size `in_features`; create it on first use."""
        shared: Any = self.ldmole_lambda_mlp[adapter_name]
        if str(in_features) not in shared:
            mlp = LambdaMLP(in_features, config.lambda_hidden, config.lambda_eps).to(like)
            mlp.reset(seeded(config.init_seed, "lambda_mlp", in_features), config.lambda_init)
            shared[str(in_features)] = mlp
        mlp = shared[str(in_features)]
        assert isinstance(mlp, LambdaMLP)
        return mlp

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "LD-MoLE cannot be merged into the base weights, because each token has its own mixture of experts; keep the "
            "adapter separate from the backbone"
        )

    def _add_modules_to_save_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        """Put the input embedding in modules_to_save and tie its tied modules to it; called for `ensure_weight_tying`."""
        config: Any = peft_config
        backbone: Any = self.model
        embedding = next(n for n, m in backbone.named_modules() if m is backbone.get_input_embeddings())
        tied = set(tied_weight_keys)
        kept = [m for m in config.modules_to_save if not any(f".{key}".endswith(f".{m}") for key in tied)]
        config.modules_to_save = list(dict.fromkeys([*kept, embedding]))
        config.modules_to_tie = tied

    def _add_targets_to_tie(self, peft_config: PeftConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            "ensure_weight_tying does not work with an embedding or its tied head in target_modules, because LD-MoLE adapts "
            "only linears; remove both from target_modules and put the embedding in modules_to_save, or, to adapt the head "
            "alone, remove the embedding from target_modules and set ensure_weight_tying=False"
        )

    def unmerge_adapter(self) -> None:
        """Raise ValueError, because LD-MoLE adapters cannot be merged."""
        self._check_merge_allowed()


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


def _parameter_like(weight: Tensor) -> Tensor:
    """Return an empty tensor with the dtype and device of new adapter parameters for a linear with this weight.

    With `low_cpu_mem_usage`, PEFT moves each parameter to the meta device when a module registers it. So register a parameter,
    and return one with the resulting device.
    """
    parameter = nn.Parameter(torch.empty(0, dtype=at_least_float32(weight.dtype), device=weight.device))
    return nn.ParameterList([parameter])[0].detach()
