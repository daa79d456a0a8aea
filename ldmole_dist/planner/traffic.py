"""What one rank sends in an optimizer step, by kind, and how many collectives carry it.

Two families of kinds. For experts, those of `parallel.wire`: elements that the rank sends to other ranks, as its own counters
count them. For ZeRO, the payload of DeepSpeed's collectives times what a ring sends of it: an all-reduce of n elements over P
ranks 2 n (P-1)/P, an all-gather to n elements or a reduce-scatter from n elements n (P-1)/P.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from ldmole_dist.planner.gathering import gathers
from ldmole_dist.planner.routed import counts, moves, payload, sizes_of
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.workload import Strategy, Workload, check
from ldmole_dist.planner.zero import STAGE0_BUCKET, Shard, flushes, padded, settings, shards

Operation = Literal["all_reduce", "all_gather", "reduce_scatter"]


class Collective(NamedTuple):
    """DeepSpeed's collectives of one kind in an optimizer step.

    Args:
        kind: "reduce" and "reduce_experts" (gradients), "update" and "update_experts" (parameters after the step, stages 1
            and 2, and small ones at stage 3), "gather" and "gather_experts" (weights in forward and backward, stage 3),
            "norm" (of gradients).
        operation: what is called.
        ranks: of its group.
        elements: of its payload, all calls together.
        calls: how many.
    """

    kind: str
    operation: Operation
    ranks: int
    elements: int
    calls: int

    @property
    def sent(self) -> float:
        """Elements that one rank of a ring sends."""
        return self.elements * (self.ranks - 1) / self.ranks * (2 if self.operation == "all_reduce" else 1)


def traffic(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Elements that one rank sends in an optimizer step, by kind: those of `parallel.wire`, then those of ZeRO."""
    sent = dispatched(workload, strategy)
    for collective in collectives(workload, strategy):
        sent[collective.kind] = sent.get(collective.kind, 0) + collective.sent
    return sent


def traffic_bytes(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """As `traffic`, in bytes."""
    return {kind: n * width(kind, workload) for kind, n in traffic(workload, strategy).items()}


def width(kind: str, workload: Workload) -> int:
    """Bytes of an element: counts are int64, gradients of trainable parameters and weights at the experts float32, what is
    computed with has the precision of the activations."""
    if kind == "counts":
        return 8
    computed_with = kind == "gather" or (kind in DISPATCH and not kind.endswith("gates"))
    return workload.itemsize if computed_with else 4


FORWARD = ("rows", "gates", "weights", "sums")
DISPATCH = ("counts", *FORWARD, *(f"grad_{kind}" for kind in FORWARD), *(f"again_{kind}" for kind in FORWARD))


def dispatched(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Elements sent for experts, by the kinds of `parallel.wire`; empty where no experts are spread."""
    check(workload, strategy)
    if strategy.ep_size == 1:
        return {}
    groups = shapes_of(workload).groups
    forwards = [payload(moves(g, workload, strategy), sizes_of(g, workload, strategy)) for g in groups]
    return {kind: n * workload.accumulation for kind, n in passes(forwards, workload, strategy).items()}


def passes(forwards: Sequence[Mapping[str, float]], workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Elements of a micro-batch by the kinds of `parallel.wire`: counts, forward, backward and recomputation.

    Args:
        forwards: what the forward of each input group moves, in the order of the model.
        workload: whose input groups they are.
        strategy: how the experts are spread.
    """
    sent = dict.fromkeys(DISPATCH, 0.0)
    for number, (group, forward) in enumerate(zip(shapes_of(workload).groups, forwards, strict=True)):
        sent["counts"] += counts(workload, strategy, group)
        for kind, elements in forward.items():
            sent[kind] += elements
            # The first group reads the embeddings, which are frozen: its rows need no gradient, unless checkpointing asks.
            needed = number > 0 or kind != "rows" or strategy.checkpointing
            sent[f"grad_{kind}"] += elements if needed else 0
            sent[f"again_{kind}"] += elements if strategy.checkpointing else 0
    return sent


def messages(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Collectives of one rank in an optimizer step, by kind: "dispatch" all-to-alls, and those of ZeRO."""
    number: dict[str, float] = {}
    if strategy.ep_size > 1:
        # Counts, there and back, the gradients of both; there and back again in a recomputation.
        each = 5 + (2 if strategy.checkpointing else 0)
        number["dispatch"] = each * len(shapes_of(workload).groups) * workload.accumulation
    for collective in collectives(workload, strategy):
        if collective.ranks > 1:
            number[collective.kind] = number.get(collective.kind, 0) + collective.calls
    return number


def collectives(workload: Workload, strategy: Strategy) -> list[Collective]:
    """What DeepSpeed calls in an optimizer step."""
    check(workload, strategy)
    return [*_reductions(workload, strategy), *_updates(workload, strategy), *_norms(strategy)]


def _reductions(workload: Workload, strategy: Strategy) -> Iterable[Collective]:
    zero = settings(strategy)
    times = workload.accumulation if strategy.stage >= 2 else 1  # stages 0 and 1 reduce what has been added up
    for kind, shard in _named(shards(workload, strategy), "reduce"):
        bucket = STAGE0_BUCKET if strategy.stage == 0 else zero["reduce_bucket_size"]
        calls = flushes(shard.elements, bucket) * times
        if strategy.stage == 3:
            if strategy.ep_size > 1:  # dense and expert gradients take turns, and a bucket holds one kind
                calls = max(calls, len(shapes_of(workload).groups) * times)
            yield Collective(kind, "reduce_scatter", shard.ranks, padded(shard, 3) * times, calls)
        else:
            yield Collective(kind, "all_reduce", shard.ranks, sum(shard.elements) * times, calls)


def _updates(workload: Workload, strategy: Strategy) -> Iterable[Collective]:
    if strategy.stage in (1, 2):
        for kind, shard in _named(shards(workload, strategy), "update"):
            if shard.ranks > 1:
                yield Collective(kind, "all_gather", shard.ranks, padded(shard, 1), 1)
    if strategy.stage == 3:
        for gather in gathers(workload, strategy):
            if gather.ranks > 1:
                yield Collective(gather.kind, "all_gather", gather.ranks, gather.elements, gather.calls)


def _norms(strategy: Strategy) -> Iterable[Collective]:
    """One number each, that clipping needs."""
    spread = strategy.ep_size > 1
    if strategy.stage == 0:
        if spread:
            yield Collective("norm", "all_reduce", strategy.ep_size, 1, 1)
        return
    yield Collective("norm", "all_reduce", strategy.ranks, 1, 1)
    if spread and strategy.stage in (1, 2):
        yield Collective("norm", "all_reduce", strategy.ranks, 1, 1)
        yield Collective("norm", "all_reduce", strategy.expert_copies, 1, 1)
    if spread and strategy.stage == 3:
        yield Collective("norm", "all_reduce", strategy.ep_size, 1, 1)
        yield Collective("norm", "all_reduce", strategy.expert_copies, 1, 1)


def _named(cut: list[Shard], kind: str) -> list[tuple[str, Shard]]:
    return list(zip((kind, f"{kind}_experts"), cut, strict=False))
