"""Estimate, by kind, how many elements one rank sends and how many collectives it calls in an optimizer step.

The kinds in `DISPATCH` are the payloads of the expert dispatch, as `parallel.wire` counts them: elements sent to other ranks in
the forward, their gradients ("grad_") and what a recomputed forward sends again ("again_").
All other kinds are collectives of DeepSpeed (`Collective`), counted as rings: among P ranks, an all-reduce of n elements sends
2 n (P-1)/P elements per rank, and an all-gather or a reduce-scatter sends n (P-1)/P.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from ldmole_dist.planner.expert_costs import count_payload, dispatch_volume, group_sizes, payload
from ldmole_dist.planner.gathering import gathers
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.workload import Strategy, Workload, check
from ldmole_dist.planner.zero import STAGE0_BUCKET, bucket_flushes, padded_elements, param_groups, settings

Operation = Literal["all_reduce", "all_gather", "reduce_scatter"]
FORWARD = ("rows", "gates", "weights", "sums")
DISPATCH = ("counts", *FORWARD, *(f"grad_{kind}" for kind in FORWARD), *(f"again_{kind}" for kind in FORWARD))


class Collective(NamedTuple):
    """DeepSpeed's collectives of one kind in an optimizer step.

    Args:
        kind: "reduce" and "reduce_experts" (gradients), "update" and "update_experts" (after the update: trainable parameters
            at stages 1 and 2, all persistent parameters, including frozen ones, at stage 3), "gather…" (weights in forward and
            backward at stage 3), "norm" (gradient norm).
        operation: Collective operation.
        ranks: Number of ranks in its group.
        elements: Number of elements that are reduced or gathered, summed over all calls.
        calls: Number of calls.
    """

    kind: str
    operation: Operation
    ranks: int
    elements: int
    calls: int

    @property
    def sent(self) -> float:
        """Number of elements that one rank sends if the collective uses a ring algorithm."""
        return self.elements * (self.ranks - 1) / self.ranks * (2 if self.operation == "all_reduce" else 1)


def elements_sent(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Return the number of elements that one rank sends in an optimizer step, by kind: dispatch first, then ZeRO."""
    sent = dispatch_elements(workload, strategy)
    for collective in collectives(workload, strategy):
        sent[collective.kind] = sent.get(collective.kind, 0) + collective.sent
    return sent


def bytes_sent(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Return the bytes that one rank sends in an optimizer step, by kind."""
    return {kind: n * element_bytes(kind, workload) for kind, n in elements_sent(workload, strategy).items()}


def element_bytes(kind: str, workload: Workload) -> int:
    """Return the bytes per element of a kind.

    Counts are int64. Frozen weights that ZeRO-3 gathers in forward and backward ("gather"), and the other payloads of the
    experts except gates, have the precision of the workload. All other kinds are counted as float32, including frozen
    persistent weights in "update".
    """
    if kind == "counts":
        return 8
    activation = kind == "gather" or (kind in DISPATCH and not kind.endswith("gates"))
    return workload.itemsize if activation else 4


def dispatch_elements(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Return the number of elements that one rank sends for experts in an optimizer step, by kind.

    Empty without expert parallelism.
    """
    check(workload, strategy)
    if strategy.ep_size == 1:
        return {}
    forwards = [
        payload(dispatch_volume(group, workload, strategy), group_sizes(group, workload, strategy))
        for group in shapes_of(workload).groups
    ]
    sent = micro_batch_elements(forwards, workload, strategy)
    return {kind: n * workload.accumulation for kind, n in sent.items()}


def micro_batch_elements(
    forwards: Sequence[Mapping[str, float]], workload: Workload, strategy: Strategy
) -> dict[str, float]:
    """Return the number of elements that one rank sends for experts in a micro-batch, by the kinds of `DISPATCH`.

    Args:
        forwards: Number of elements by kind that the forward of each input group sends, in the order of the model.
        workload: Workload with these input groups.
        strategy: Strategy; its ep_size determines the size of the count messages, its checkpointing whether recomputed forwards
            send again and whether the rows of the first group have gradients.
    """
    sent = dict.fromkeys(DISPATCH, 0.0)
    for i, (group, forward) in enumerate(zip(shapes_of(workload).groups, forwards, strict=True)):
        sent["counts"] += count_payload(group, workload, strategy)
        for kind, elements in forward.items():
            sent[kind] += elements
            # All kinds in `FORWARD` have gradients, except the rows of the first group without checkpointing: the output of the
            # frozen embeddings needs a gradient only under checkpointing.
            if i > 0 or kind != "rows" or strategy.checkpointing:
                sent[f"grad_{kind}"] += elements
            if strategy.checkpointing:
                sent[f"again_{kind}"] += elements
    return sent


def collective_calls(workload: Workload, strategy: Strategy) -> dict[str, float]:
    """Return the number of collectives of one rank in an optimizer step, by kind; "dispatch" counts the all-to-alls."""
    calls: dict[str, float] = {}
    if strategy.ep_size > 1:
        # Per input group: counts, dispatch and return, and the gradients of dispatch and return. A recomputation repeats
        # dispatch and return.
        per_group = 5 + (2 if strategy.checkpointing else 0)
        calls["dispatch"] = per_group * len(shapes_of(workload).groups) * workload.accumulation
    for collective in collectives(workload, strategy):
        if collective.ranks > 1:
            calls[collective.kind] = calls.get(collective.kind, 0) + collective.calls
    return calls


def collectives(workload: Workload, strategy: Strategy) -> list[Collective]:
    """Return DeepSpeed's collectives in an optimizer step."""
    check(workload, strategy)
    return [*_reductions(workload, strategy), *_updates(workload, strategy), *_norms(strategy)]


def _reductions(workload: Workload, strategy: Strategy) -> Iterable[Collective]:
    """Yield the collectives that average gradients over ranks."""
    bucket = STAGE0_BUCKET if strategy.stage == 0 else settings(strategy)["reduce_bucket_size"]
    times = workload.accumulation if strategy.stage >= 2 else 1  # stages 0 and 1 reduce the accumulated gradient
    for kind, group in zip(("reduce", "reduce_experts"), param_groups(workload, strategy), strict=False):
        calls = bucket_flushes(group.elements, bucket) * times
        if strategy.stage < 3:
            yield Collective(kind, "all_reduce", group.ranks, sum(group.elements) * times, calls)
            continue
        if strategy.ep_size > 1:
            # Gradients of experts and of other parameters never share a bucket: a gradient of the other kind first flushes the
            # bucket. The kinds alternate by input group, so each group causes at least one flush of each kind.
            calls = max(calls, len(shapes_of(workload).groups) * times)
        yield Collective(kind, "reduce_scatter", group.ranks, padded_elements(group, 3) * times, calls)


def _updates(workload: Workload, strategy: Strategy) -> Iterable[Collective]:
    """Yield the all-gathers of parameters: after the update and, at stage 3, also in forward and backward."""
    if strategy.stage in (1, 2):
        for kind, group in zip(("update", "update_experts"), param_groups(workload, strategy), strict=False):
            if group.ranks > 1:
                yield Collective(kind, "all_gather", group.ranks, padded_elements(group, 1), 1)
    if strategy.stage == 3:
        for gather in gathers(workload, strategy):
            if gather.ranks > 1:
                yield Collective(gather.kind, "all_gather", gather.ranks, gather.elements, gather.calls)


def _norms(strategy: Strategy) -> Iterable[Collective]:
    """Yield the all-reduces of the gradient norm, each of one element, that gradient clipping needs."""
    s = strategy
    if s.ep_size == 1:
        groups = [] if s.stage == 0 else [s.ranks]
    else:
        groups = {0: [s.ep_size], 3: [s.ranks, s.ep_size, s.expert_copies]}.get(
            s.stage, [s.ranks, s.ranks, s.expert_copies]
        )
    return (Collective("norm", "all_reduce", ranks, 1, 1) for ranks in groups)
