"""What moves, is kept and is computed for the experts of one input group: exact for known routing, else an expectation.

A token uses `active` experts of each linear, drawn without preference and independently for each linear. Where it uses all of
them, or all of them travel, nothing is drawn and every number is exact.

Shapes: T tokens, D in-features, O out-features, E experts in all, L experts held here, R LoRA rank, P ranks of the
expert-parallel group, G linears in the input group, N rows sent (and received), W experts here, own and lent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ldmole_dist.method.experts import fused_up_to
from ldmole_dist.parallel.plan import GroupSizes, count_elements
from ldmole_dist.planner.shapes import Group
from ldmole_dist.planner.workload import Strategy, Workload


class Moves(NamedTuple):
    """For a micro-batch of one rank: rows it sends, those of each linear, and experts of each linear that come to it."""

    rows: float
    linear_rows: float
    experts: int


class Work(NamedTuple):
    """One call of `apply_experts`: rows, experts, and active (row, expert) pairs."""

    rows: float
    experts: int
    pairs: float

    def fused(self, workload: Workload) -> bool:
        """Which formulation it takes (`method.experts.apply_experts`)."""
        return self.experts * workload.rank * self.rows <= fused_up_to(workload.on_cpu) * self.pairs

    def columns(self, workload: Workload) -> float:
        """Elements of h: R for each (row, expert) computed."""
        return (self.rows * self.experts if self.fused(workload) else self.pairs) * workload.rank


def sizes_of(group: Group, workload: Workload, strategy: Strategy) -> GroupSizes:
    """Widths as `parallel.plan` takes them."""
    held = workload.num_experts // strategy.ep_size
    return GroupSizes(group.in_features, group.out_features, workload.rank, held)


def moves(group: Group, workload: Workload, strategy: Strategy) -> Moves:
    """What the dispatch moves to and from one rank; "auto" is the cheaper of rows and experts at these expectations."""
    P, T = strategy.ep_size, workload.tokens
    if P == 1:
        return Moves(0, 0, 0)
    sizes = sizes_of(group, workload, strategy)
    needed = _needed(workload.num_experts, sizes.experts, workload.active)
    G = len(group.out_features)
    rows = Moves(T * (P - 1) * (1 - (1 - needed) ** G), T * (P - 1) * needed, 0)
    experts = Moves(0, 0, (P - 1) * sizes.experts)
    if strategy.dispatch == "auto":
        return min(rows, experts, key=lambda m: sum(payload(m, sizes).values()))
    return experts if strategy.dispatch == "gather" else rows


def _needed(num_experts: int, held: int, active: float) -> float:
    """Probability that a token needs any of `held` experts."""
    if active == num_experts:
        return 1.0
    few, share = int(active), active % 1

    def none(k: int) -> float:
        return math.comb(num_experts - held, k) / math.comb(num_experts, k)

    return 1 - (1 - share) * none(few) - (share * none(few + 1) if share else 0)


def payload(m: Moves, sizes: GroupSizes) -> dict[str, float]:
    """Elements that one rank sends in a forward (what it sends of sums and weights, others receive; all alike)."""
    return {
        "rows": m.rows * sizes.in_features,
        "gates": m.rows * len(sizes.out_features) * sizes.experts,
        "weights": m.experts * sum(sizes.weights()),
        "sums": m.linear_rows * sum(sizes.out_features),
    }


def counts(workload: Workload, strategy: Strategy, group: Group) -> int:
    """Numbers that one rank tells the others before."""
    return count_elements(strategy.ep_size, sizes_of(group, workload, strategy))


def work(group: Group, workload: Workload, strategy: Strategy) -> Iterator[tuple[int, Work]]:
    """(O, what is computed) of each linear: this rank's tokens at the experts that are here, then the rows received."""
    m = moves(group, workload, strategy)
    held = workload.num_experts // strategy.ep_size
    T, k, E = workload.tokens, workload.active, workload.num_experts
    here = held + m.experts
    for out in group.out_features:
        yield out, Work(T, here, T * k * here / E)
        if strategy.ep_size > 1:
            yield out, Work(m.rows, held, T * k * (E - here) / E)


def kept(group: Group, workload: Workload, strategy: Strategy) -> float:
    """Bytes that the experts of a group keep for the backward, beyond x and the routing that others keep too.

    Indices are int64, and a view keeps the whole of what it is a view of.
    """
    w, a = workload, workload.itemsize
    h = sum(call.columns(w) for _, call in work(group, w, strategy)) * a
    if strategy.ep_size == 1:
        return h
    m, sizes = moves(group, w, strategy), sizes_of(group, w, strategy)
    G, L = len(group.out_features), sizes.experts
    rows = m.rows * (16 + 8 * G)  # which token, and its place among the weights of each linear
    came = m.rows * (group.in_features * a + G * L * 4)
    sums = G * m.linear_rows * 16  # which tokens they are of
    if m.linear_rows < m.rows:
        sums += G * m.linear_rows * 8  # which of the rows received are answered
    lent = 0.0
    if m.experts:
        weights = (L + m.experts) * sum(sizes.weights()) * a
        lent = weights + G * (w.tokens * (L + m.experts) * 4 + m.experts * 16 + (L + m.experts) * 8)
    return h + rows + came + sums + lent + strategy.ep_size * G * L


def temporaries(group: Group, workload: Workload, strategy: Strategy) -> float:
    """Bytes that the backward of one linear's experts needs for a moment: an estimate."""
    w = workload
    most = 0.0
    for out, call in work(group, w, strategy):
        columns = call.columns(w)
        if call.fused(w):
            most = max(most, columns * (3 * 4 + 2 * w.itemsize))
        else:
            most = max(
                most, call.rows * group.in_features * 4 + columns / w.rank * (group.in_features + out) * w.itemsize
            )
    return most
