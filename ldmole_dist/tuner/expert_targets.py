"""The routed experts of MoE backbones: which of them `target_parameters` selects, and which of them can be adapted.

Shapes: D in-features, O out-features, J base experts.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.experts import DOWN, GATE_UP
from ldmole_dist.tuner.targets import DTYPES

logger = logging.getLogger(__name__)

# (is_transposed, has_bias) of the layouts that tests/tuner/test_routed_experts.py compares with a reference.
LAYOUTS = {(False, False), (True, False), (True, True)}


class ExpertTarget(NamedTuple):
    """A projection of routed experts that `target_parameters` selects.

    Attributes:
        module: name of the experts module in the backbone.
        projection: "gate_up_proj" or "down_proj".
        in_features: D.
        out_features: O.
    """

    module: str
    projection: str
    in_features: int
    out_features: int


def routed_experts(model: nn.Module) -> dict[str, Any]:
    """Return the modules that hold the weights of routed experts as parameters of their own, by their names in the backbone.

    The name of their class contains "Expert" but not "Shared", and they are not linears.
    """
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if "Expert" in type(module).__name__
        and "Shared" not in type(module).__name__
        and not isinstance(module, (nn.Linear, Conv1D))
        and next(module.parameters(recurse=False), None) is not None
    }


def expert_targets(model: nn.Module, config: LdMoleConfig) -> Iterator[ExpertTarget]:
    """Yield the projections of routed experts that `target_parameters` selects.

    Names of parameters are matched as PEFT matches the names of modules with `target_modules`. `exclude_modules` and
    `modules_to_save` exclude parameters in the same way.

    Args:
        model: backbone, with or without adapters.
        config: config of the adapter.

    Raises:
        ValueError: if an entry matches no parameter or a parameter that cannot be adapted, or if there are entries and
            `router_input` is "hidden".
    """
    entries = config.target_parameters or []
    if entries and config.router_input == "hidden":
        raise ValueError(
            "router_input='hidden' does not support target_parameters, because routed experts read several rows per token; set "
            "router_input='layer'"
        )
    matching = copy.copy(config)
    matching.target_modules = entries
    experts = routed_experts(model)
    parameters = [name.replace(".base_layer.", ".") for name, _ in model.named_parameters()]
    unmatched = [entry for entry in entries if not any(f".{name}".endswith(f".{entry}") for name in parameters)]
    if unmatched:
        choices = sorted(_suggestions(experts))
        remedy = (
            f"choose from {choices}"
            if choices
            else "its routed experts, if any, cannot be adapted; remove target_parameters"
        )
        raise ValueError(f"target_parameters {unmatched} match no parameter of this model; {remedy}")
    for name in parameters:
        if check_target_module_exists(matching, name) is not True:
            continue
        path, _, projection = name.rpartition(".")
        if path not in experts:
            raise ValueError(
                f"LD-MoLE cannot adapt {name}: it is not a parameter of routed experts; remove it from target_parameters, and "
                "name its module in target_modules if that is a linear"
            )
        if reason := why_experts_not_adaptable(experts[path]):
            raise ValueError(
                f"LD-MoLE cannot adapt {name}: this {type(experts[path]).__name__} {reason}. Without target_parameters, "
                f"the routed experts, which have {_share(model, experts):.0%} of the weights, are not adapted"
            )
        if projection not in (GATE_UP, DOWN):
            raise ValueError(
                f"LD-MoLE cannot adapt {name}: of routed experts, it adapts {GATE_UP} and {DOWN}; remove it from "
                "target_parameters"
            )
        yield ExpertTarget(path, projection, *_features(experts[path], projection))


def why_experts_not_adaptable(experts: Any) -> str | None:
    """Return why routed experts cannot be adapted and what to do about it, as the rest of a sentence; None if they can."""
    if not all(hasattr(experts, flag) for flag in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")):
        return "does not use transformers' experts interface; adapt the other linears of the backbone"
    for parameter in experts.parameters():
        if parameter.dtype not in DTYPES or type(parameter.data) is not torch.Tensor:
            kind = f"{type(parameter.data).__name__} of {parameter.dtype}"
            return f"has weights that are {kind}; load the backbone without quantization and tensor parallelism"
    if not experts.has_gate or experts.has_post_expert_norm:
        kind = "no gate" if not experts.has_gate else "a norm after each expert"
        return f"has {kind}, which LD-MoLE is not tested with; adapt the other linears of the backbone"
    names = {GATE_UP, DOWN} | ({f"{GATE_UP}_bias", f"{DOWN}_bias"} if experts.has_bias else set())
    layout = experts.is_transposed, experts.has_bias
    if layout not in LAYOUTS or {name for name, _ in experts.named_parameters()} != names:
        return "has a layout that LD-MoLE is not tested with; adapt the other linears of the backbone"
    if experts._is_expert_parallel:
        return "is spread over ranks by transformers; load the backbone without distributed_config"
    return None


def warn_if_experts_left_out(model: nn.Module, config: LdMoleConfig) -> None:
    """Log a warning with the share of the weights in routed experts, if there are any and `target_parameters` is not set."""
    experts = {} if config.target_parameters else routed_experts(model)
    if not experts:
        return
    reason = why_experts_not_adaptable(next(iter(experts.values())))
    logger.warning(
        "%.0f%% of the weights of this backbone are in routed experts, such as %s, and are not adapted; %s",
        100 * _share(model, experts),
        next(iter(experts)),
        f"LD-MoLE cannot adapt them: this {type(next(iter(experts.values()))).__name__} {reason}"
        if reason
        else f"to adapt them, set target_parameters to {sorted(_suggestions(experts))}",
    )


def _suggestions(experts: dict[str, Any]) -> set[str]:
    """Return an entry of `target_parameters` for each projection that can be adapted, such as "mlp.experts.down_proj"."""
    ends = {".".join(name.split(".")[-2:]) for name, module in experts.items() if not why_experts_not_adaptable(module)}
    return {f"{end}.{projection}" for end in ends for projection in (GATE_UP, DOWN)}


def _features(experts: Any, projection: str) -> tuple[int, int]:
    # Read the shape from a copy on the meta device, because this rank may hold only a shard of the weights.
    with torch.device("meta"):
        shape = getattr(type(experts)(experts.config), projection).shape
    D, O = shape[1:] if experts.is_transposed else (shape[2], shape[1])
    return D, O


def _share(model: nn.Module, experts: dict[str, Any]) -> float:
    """Return the share of the weights of a backbone that is in routed experts."""
    whole = model
    if isinstance(model, PreTrainedModel) and any(p.numel() == 0 for p in model.parameters()):
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # ZeRO-3 has partitioned the weights
            whole = type(model)(copy.deepcopy(model.config))
        experts = {name: whole.get_submodule(name) for name in experts}
    inside = sum(p.numel() for module in experts.values() for p in module.parameters(recurse=False))
    return inside / sum(p.numel() for p in whole.parameters())
