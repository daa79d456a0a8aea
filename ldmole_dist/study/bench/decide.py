"""Measure what a dispatch decides to send over many shapes, and how long deciding takes: `ldmole bench decide`.

No ranks are started: the decision is a function of one rank's routing (`parallel.decision`).

Shapes: G linears of the input group, T tokens, P ranks, L experts of each rank.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ldmole_dist.parallel.decision import GroupSizes, choose_fetched_experts, payload_elements
from ldmole_dist.study.machine import setup
from ldmole_dist.study.table import markdown_table

IN_FEATURES = 256
OUT_FEATURES = (256, 64, 64)  # of q, k and v; a group of one linear has the first only


class Cell(NamedTuple):
    """One shape and routing: P ranks, all experts, LoRA rank, tokens of this rank, mean number of active experts of a token,
    exponent of the power law of the experts' popularity, and G linears."""

    ranks: int
    experts: int
    lora_rank: int
    tokens: int
    active: float
    skew: float
    linears: int

    def sizes(self) -> GroupSizes:
        """Return the widths of the input group."""
        return GroupSizes(IN_FEATURES, OUT_FEATURES[: self.linears], self.lora_rank, self.experts // self.ranks)

    def support(self) -> Tensor:
        """Return a random support, (G, T, P, L) bool, which depends on the cell only."""
        seed = self.ranks * self.experts + self.tokens
        held = self.experts // self.ranks
        return draw_support(self.linears, self.tokens, self.ranks, held, self.active, self.skew, seed)


CELLS = [Cell(*c) for c in itertools.product((2, 4, 8), (8, 64), (8, 32), (64, 512), (1.5, 4.0), (0.0, 1.0), (1, 3))]


def draw_support(G: int, T: int, P: int, L: int, k: float, skew: float, seed: int) -> Tensor:
    """Draw (G, T, P, L) bool with a mean of k active experts per token and a power law of popularity."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, P * L + 1).float().pow(-skew)[torch.randperm(P * L, generator=generator)]
    scores = torch.rand(G, T, P * L, generator=generator).pow(1 / popularity)
    counts = (torch.rand(T, 1, generator=generator) < k % 1).long() + int(k)
    support = scores.argsort(-1, descending=True).argsort(-1) < counts
    return support.view(G, T, P, L)


def payload(support_GTPL: Tensor, fetched_PGL: Tensor, sizes: GroupSizes) -> int:
    """Return the elements that rank 0 sends in one forward, counts excluded."""
    return sum(payload_elements(support_GTPL, fetched_PGL, 0, sizes).values())


def all_or_none(support_GTPL: Tensor, fetched: bool) -> Tensor:
    """Return the decision, (P, G, L) bool, to send all experts of the other ranks to rank 0, or none of them."""
    G, _, P, L = support_GTPL.shape
    fetched_PGL = torch.full((P, G, L), fetched)
    fetched_PGL[0] = False
    return fetched_PGL


def decide(cell: Cell, repeats: int = 1) -> dict[str, float]:
    """Return the elements that a rank's tokens send in one forward, by strategy, and the median milliseconds to decide.

    Counts, which every strategy exchanges, are in neither.
    """
    support, sizes = cell.support(), cell.sizes()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        fetched = choose_fetched_experts(support, 0, sizes)
        seconds.append(time.perf_counter() - started)
    pairs_G = support[:, :, 1:].sum((1, 2, 3)).tolist()
    return {
        "row per pair": sum(n * (IN_FEATURES + out) for n, out in zip(pairs_G, sizes.out_features, strict=True)),
        "all_to_all": payload(support, all_or_none(support, False), sizes),
        "gather": payload(support, all_or_none(support, True), sizes),
        "auto": payload(support, fetched, sizes),
        "deciding ms": 1e3 * statistics.median(seconds),
    }


def main(repeats: int) -> None:
    """Measure and print all cells."""
    rows = [cell._asdict() | decide(cell, repeats) for cell in CELLS]
    times = [row["deciding ms"] for row in rows]
    print(f"Elements sent in one forward of a rank's tokens; {torch.get_num_threads()} threads; {setup()}")
    print(markdown_table(rows))
    print(f"deciding: median {statistics.median(times):.2f} ms, longest {max(times):.2f} ms (wall-clock time)")
