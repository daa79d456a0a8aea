"""Order in which ZeRO-3's hooks are called for the modules of a model, traced on the meta device.

DeepSpeed fetches the weights of a module before its forward and before its backward, and may release them after each. At
most three decoder layers are traced; for a deeper model, the events of the middle layer are repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ldmole_dist.planner.activations import on_meta, run_forward, traced_model
from ldmole_dist.planner.layers import in_layer, layer_prefix, rename
from ldmole_dist.planner.workload import Workload
from ldmole_dist.tuner.layer import LdMoleLinear


class Event(NamedTuple):
    """Call of a DeepSpeed hook before or after a module.

    Args:
        kind: "fetch" before the module, "release" after it.
        module: Name of the module.
        forward: True in a forward or a recomputed forward, False in the backward.
        recomputing: Whether the forward is a recomputation in the backward.
    """

    kind: Literal["fetch", "release"]
    module: str
    forward: bool
    recomputing: bool = False


class Order(NamedTuple):
    """Order of the hooks in one micro-batch.

    Args:
        events: Calls of the hooks, in order.
        uses: Name of a module -> names of the parameters that its hooks fetch: its own, without those of its submodules, and,
            for the first linear of an input group, the experts of all linears of the group.
    """

    events: tuple[Event, ...]
    uses: dict[str, tuple[str, ...]]


@lru_cache(maxsize=16)
def module_order(workload: Workload, checkpointing: bool) -> Order:
    """Return the order of the hooks in one forward and backward of the whole model."""
    small = replace(workload, seq=16, micro_batch=1, answer_tokens=None)  # the order does not depend on the batch
    depth = workload.backbone.num_hidden_layers
    layers = min(depth, 3)
    model = traced_model(small, layers, checkpointing, partitioned=True)
    names = {module: name for name, module in model.named_modules()}
    # A tied output head's weight has the name of the embedding's, because `named_parameters` lists each parameter once.
    first = {parameter: name for name, parameter in model.named_parameters()}
    uses = {name: tuple(first[p] for p in module.parameters(recurse=False)) for module, name in names.items()}
    for module, name in names.items():
        if isinstance(module, LdMoleLinear):
            (group,) = module.groups.values()
            if group.linears[0] is module:  # engine.build registers the experts of a group with its first linear
                uses[name] += tuple(
                    f"{names[m]}.ldmole_adapters.{adapter}.{bank}"
                    for m in group.linears
                    for bank in ("lora_A", "lora_B")
                    for adapter in m.ldmole_adapters
                )
    events: list[Event] = []
    in_backward = False
    for module, name in names.items():
        _record(module, name, events, lambda: in_backward)
    with on_meta(partitioned=True):
        loss = run_forward(model, small)
        in_backward = True
        loss.backward()
    prefix = layer_prefix(model)
    return Order(tuple(_deepened(events, prefix, layers, depth)), _all_layers(uses, prefix, layers, depth))


def _record(module: nn.Module, name: str, events: list[Event], in_backward: Callable[[], bool]) -> None:
    """Register hooks in the same places as DeepSpeed; each call of a hook appends an event."""
    remaining = [0]  # inputs of the last forward whose gradients the backward has not computed yet

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        remaining[0] = 0
        events.append(Event("fetch", name, True, in_backward()))

        def counted(tensor: Tensor) -> Tensor:
            remaining[0] += tensor.requires_grad
            return _OnGradient.apply(tensor, released)

        return tree_map_only(Tensor, counted, inputs)

    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        events.append(Event("release", name, True, in_backward()))
        return tree_map_only(Tensor, lambda tensor: _OnGradient.apply(tensor, fetched), output)

    def fetched() -> None:
        events.append(Event("fetch", name, False))

    def released() -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            events.append(Event("release", name, False))

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


class _OnGradient(torch.autograd.Function):
    """Identity whose backward calls `callback`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, callback: Callable[[], None]) -> Tensor:
        ctx.callback = callback
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.callback()
        return grad, None


def _deepened(events: list[Event], prefix: str, layers: int, depth: int) -> list[Event]:
    """Return the events of a model with `depth` layers: the traced events, with those of the middle layer repeated."""
    if depth == layers:
        return events
    _, middle, last = (events.index(Event("fetch", f"{prefix}.{i}", True)) for i in range(3))
    end, back_middle, back_last = (events.index(Event("fetch", f"{prefix}.{i}", False)) for i in range(3))

    def layer(start: int, stop: int, old: int, new: int) -> list[Event]:
        return [event._replace(module=rename(event.module, prefix, old, new)) for event in events[start:stop]]

    found = events[:middle]
    for i in range(1, depth - 1):
        found += layer(middle, last, 1, i)
    found += layer(last, back_middle, 2, depth - 1)  # forward and backward of the last layer
    for i in reversed(range(1, depth - 1)):
        found += layer(back_middle, end, 1, i)
    return found + events[end:]


def _all_layers(uses: dict[str, tuple[str, ...]], prefix: str, layers: int, depth: int) -> dict[str, tuple[str, ...]]:
    """Return `Order.uses` for `depth` layers: layers that were not traced use the parameters of layer 1, renamed."""
    found = dict(uses)
    for i in range(layers, depth):
        for name, parameters in uses.items():
            if in_layer(name, prefix, 1):
                found[rename(name, prefix, 1, i)] = tuple(rename(p, prefix, 1, i) for p in parameters)
    return found
