"""Traffic, memory and computation of the experts of one input group.

Each token is assumed to use `Workload.active` experts of each linear, drawn uniformly and independently per linear, so the
numbers are expectations. The numbers are exact if every token uses all experts, or if the dispatch sends all experts
("gather").

Shapes: T tokens, D in-features, O out-features, E experts, L local experts, R LoRA rank, P ranks of the expert-parallel group,
G linears of the input group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ldmole_dist.method.experts import fused_threshold
from ldmole_dist.parallel.decision import GroupSizes, count_message_elements
from ldmole_dist.planner.shapes import Group
from ldmole_dist.planner.workload import Strategy, Workload

INT64 = 8  # bytes


class Volume(NamedTuple):
    """Token rows and experts that one rank exchanges in the forward of a micro-batch.

    Args:
        rows: Number of token rows sent: one per token and destination rank with an expert that the token uses in at least one
            linear of the group.
        linear_rows: Number of sums returned for one linear: one per sent row that uses the destination's experts of this
            linear.
        experts: Number of experts of each linear that are fetched from other ranks.
    """

    rows: float
    linear_rows: float
    experts: int


class ExpertCall(NamedTuple):
    """Sizes of one call of `apply_experts`.

    Args:
        rows: Number of token rows.
        experts: Number of experts.
        pairs: Number of active (row, expert) pairs.
    """

    rows: float
    experts: int
    pairs: float

    def fused(self, workload: Workload) -> bool:
        """Return whether `apply_experts` computes all experts for all rows."""
        return self.experts * workload.lora_rank * self.rows <= fused_threshold(workload.on_cpu) * self.pairs

    def hidden(self, workload: Workload) -> float:
        """Return the number of elements in the output of A: R for each (row, expert) pair that is computed, active or not."""
        return (self.rows * self.experts if self.fused(workload) else self.pairs) * workload.lora_rank


def group_sizes(group: Group, workload: Workload, strategy: Strategy) -> GroupSizes:
    """Return the sizes of an input group in the form that the dispatch uses."""
    local = workload.num_experts // strategy.ep_size
    return GroupSizes(group.in_features, group.out_features, (workload.lora_rank,) * len(group.out_features), local)


def dispatch_volume(group: Group, workload: Workload, strategy: Strategy) -> Volume:
    """Return the expected numbers of rows and experts that one rank exchanges; all are 0 without expert parallelism.

    Mode "all_to_all" exchanges rows, "gather" all remote experts. "auto", which decides per expert in training, is estimated as
    the one of these with the smaller payload.
    """
    P, T = strategy.ep_size, workload.tokens
    if P == 1:
        return Volume(0, 0, 0)
    sizes = group_sizes(group, workload, strategy)
    needed = _probability_of_any(workload.num_experts, sizes.experts, workload.active)
    G = len(group.out_features)
    rows = Volume(T * (P - 1) * (1 - (1 - needed) ** G), T * (P - 1) * needed, 0)
    experts = Volume(0, 0, (P - 1) * sizes.experts)
    if strategy.dispatch == "auto":
        return min(rows, experts, key=lambda volume: sum(payload(volume, sizes).values()))
    return experts if strategy.dispatch == "gather" else rows


def _probability_of_any(num_experts: int, local: int, active: float) -> float:
    """Return the probability that a token uses at least one of `local` experts.

    With a fractional `active`, a token uses the next lower or the next higher number of experts, with probabilities that give
    this mean.
    """
    if active == num_experts:
        return 1.0
    fewer, share = int(active), active % 1

    def none(k: int) -> float:
        return math.comb(num_experts - local, k) / math.comb(num_experts, k)

    return 1 - (1 - share) * none(fewer) - (share * none(fewer + 1) if share else 0)


def payload(volume: Volume, sizes: GroupSizes) -> dict[str, float]:
    """Return the number of elements that one rank sends in the forward of a micro-batch, for one input group.

    With balanced routing, each rank sends as many sums and weights as it receives.

    Returns:
        By the kinds of `parallel.wire`: "rows" (inputs), "gates" (routing weights of these rows), "weights" (A and B of
        experts) and "sums" (returned outputs).
    """
    return {
        "rows": volume.rows * sizes.in_features,
        "gates": volume.rows * len(sizes.out_features) * sizes.experts,
        "weights": volume.experts * sum(sizes.weights()),
        "sums": volume.linear_rows * sum(sizes.out_features),
    }


def count_payload(group: Group, workload: Workload, strategy: Strategy) -> int:
    """Return the number of elements in the count messages that one rank sends before the dispatch."""
    return count_message_elements(strategy.ep_size, group_sizes(group, workload, strategy))


def expert_calls(group: Group, workload: Workload, strategy: Strategy) -> Iterator[tuple[int, ExpertCall]]:
    """Yield pairs (O, call) for each linear of a group.

    The first call of a linear applies the local and the fetched experts to the tokens of this rank. With expert parallelism, a
    second call applies the local experts to the received rows.
    """
    volume = dispatch_volume(group, workload, strategy)
    local = workload.num_experts // strategy.ep_size
    T, k, E = workload.tokens, workload.active, workload.num_experts
    here = local + volume.experts
    for out in group.out_features:
        yield out, ExpertCall(T, here, T * k * here / E)
        if strategy.ep_size > 1:
            yield out, ExpertCall(volume.rows, local, T * k * (E - here) / E)


def saved_bytes(group: Group, workload: Workload, strategy: Strategy) -> float:
    """Return the bytes that a group's experts save for the backward of a micro-batch.

    The input x and the routing of this rank's own tokens are not included: `activations` counts them.

    A saved view is counted with the size of its base tensor, whose memory it keeps.
    """
    w, itemsize = workload, workload.itemsize
    hidden = sum(call.hidden(w) for _, call in expert_calls(group, w, strategy)) * itemsize
    if strategy.ep_size == 1:
        return hidden
    volume, sizes = dispatch_volume(group, w, strategy), group_sizes(group, w, strategy)
    G, L, fetched = len(group.out_features), sizes.experts, volume.experts
    row_indices = volume.rows * (2 + G) * INT64  # (destination, token), and the index of the gates of each linear
    received = volume.rows * (group.in_features * itemsize + G * L * 4)  # x, and float32 gates
    sum_indices = G * volume.linear_rows * 2 * INT64  # (destination, token) of the returned sums
    if volume.linear_rows < volume.rows:
        sum_indices += G * volume.linear_rows * INT64  # indices of the received rows with a returned sum
    gathered = 0.0
    if fetched:
        # Copies of the local and fetched A and B; for each linear, the float32 routing weights of these experts, the
        # (destination, expert) indices of the sent experts, and the indices of the local and fetched experts.
        gathered = (L + fetched) * sum(sizes.weights()) * itemsize
        gathered += G * (w.tokens * (L + fetched) * 4 + fetched * 2 * INT64 + (L + fetched) * INT64)
    # The last term is the bool mask of the fetched experts.
    return hidden + row_indices + received + sum_indices + gathered + strategy.ep_size * G * L


def temporary_bytes(group: Group, workload: Workload, strategy: Strategy) -> float:
    """Return an estimate of the temporary bytes in the backward of one linear's experts; the maximum over the linears."""
    w, most = workload, 0.0
    for out, call in expert_calls(group, w, strategy):
        hidden = call.hidden(w)
        if call.fused(w):
            most = max(most, hidden * (3 * 4 + 2 * w.itemsize))
        else:
            inputs = call.rows * group.in_features * 4
            most = max(most, inputs + hidden / w.lora_rank * (group.in_features + out) * w.itemsize)
    return most
