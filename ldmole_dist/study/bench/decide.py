"""What the dispatch decides over many shapes, routings and group sizes, and what deciding costs: `ldmole bench decide`.

No ranks are started: the decision is a function of one rank's routing (`parallel.decision`).

Shapes: G linears of the input group, T tokens, P ranks, L experts of each rank.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ldmole_dist.parallel.decision import GroupSizes, choose_fetched_experts, payload_elements

OUT_FEATURES = (256, 64, 64)  # of an input group of q, k, v; the first alone where a group has one linear
IN_FEATURES = 256


class Cell(NamedTuple):
    """One shape and routing: P ranks, E experts, R their rank, T tokens of this rank, k active experts a token, a power law
    of exponent `skew` for their popularity, G linears that share the input."""

    ranks: int
    experts: int
    rank: int
    tokens: int
    active: float
    skew: float
    linears: int

    def sizes(self) -> GroupSizes:
        """Widths of the input group."""
        return GroupSizes(IN_FEATURES, OUT_FEATURES[: self.linears], self.rank, self.experts // self.ranks)

    def support(self) -> Tensor:
        """(G, T, P, L) bool, drawn anew for each shape, always the same."""
        seed = self.ranks * self.experts + self.tokens
        held = self.experts // self.ranks
        return draw_support(self.linears, self.tokens, self.ranks, held, self.active, self.skew, seed)


CELLS = [Cell(*c) for c in itertools.product((2, 4, 8), (8, 64), (8, 32), (64, 512), (1.5, 4.0), (0.0, 1.0), (1, 3))]


class Decided(NamedTuple):
    """Elements of one forward that this rank's tokens put on the wire under each strategy, and seconds that "auto" took to
    decide (without the exchange of counts, which every strategy needs)."""

    cell: Cell
    row_per_pair: int
    all_to_all: int
    gather: int
    auto: int
    seconds: float


def draw_support(G: int, T: int, P: int, L: int, k: float, skew: float, seed: int) -> Tensor:
    """(G, T, P, L) bool: about k active experts a token, their popularity a power law of exponent `skew`."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, P * L + 1).float().pow(-skew)[torch.randperm(P * L, generator=generator)]
    scores = torch.rand(G, T, P * L, generator=generator).pow(1 / popularity)
    counts = (torch.rand(T, 1, generator=generator) < k % 1).long() + int(k)
    support = scores.argsort(-1, descending=True).argsort(-1) < counts
    return support.view(G, T, P, L)


def payload(support_GTPL: Tensor, fetched_PGL: Tensor, sizes: GroupSizes) -> int:
    """Elements of one forward of rank 0, counts apart."""
    return sum(payload_elements(support_GTPL, fetched_PGL, 0, sizes).values())


def all_or_none(support_GTPL: Tensor, fetched: bool) -> Tensor:
    """(P, G, L): every expert of another rank travels to rank 0, or none does."""
    G, _, P, L = support_GTPL.shape
    fetched_PGL = torch.full((P, G, L), fetched)
    fetched_PGL[0] = False
    return fetched_PGL


def decide(cell: Cell, repeats: int = 1) -> Decided:
    """Decide once, timed `repeats` times."""
    support, sizes = cell.support(), cell.sizes()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        fetched = choose_fetched_experts(support, 0, sizes)
        seconds.append(time.perf_counter() - begun)
    pairs_G = support[:, :, 1:].sum((1, 2, 3)).tolist()
    return Decided(
        cell,
        row_per_pair=sum(n * (IN_FEATURES + out) for n, out in zip(pairs_G, sizes.out_features, strict=True)),
        all_to_all=payload(support, all_or_none(support, False), sizes),
        gather=payload(support, all_or_none(support, True), sizes),
        auto=payload(support, fetched, sizes),
        seconds=statistics.median(seconds),
    )


def print_table(rows: Iterable[Decided]) -> None:
    """Print every cell, and a summary."""
    print(
        f"elements of one forward of a rank's tokens; d={IN_FEATURES}, out-features {OUT_FEATURES} or the first of them; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"{'P':>2} {'E':>3} {'r':>3} {'T':>4} {'k':>4} {'skew':>4} {'G':>2} ", end="")
    print(f"{'row per pair':>12} {'all_to_all':>10} {'gather':>10} {'auto':>10} {'saved':>6} {'deciding ms':>11}")
    times = []
    for d in rows:
        c, better = d.cell, min(d.all_to_all, d.gather)
        print(
            f"{c.ranks:2} {c.experts:3} {c.rank:3} {c.tokens:4} {c.active:4} {c.skew:4} {c.linears:2} {d.row_per_pair:12,} "
            f"{d.all_to_all:10,} {d.gather:10,} {d.auto:10,} {1 - d.auto / max(better, 1):6.1%} {1e3 * d.seconds:11.2f}"
        )
        times.append(1e3 * d.seconds)
    print(
        "saved: against the better of all_to_all and gather; deciding: median "
        f"{statistics.median(times):.2f} ms, at most {max(times):.2f} ms an input group and micro-batch"
    )
