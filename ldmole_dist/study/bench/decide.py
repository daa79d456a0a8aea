"""Measure how many elements a dispatch decides to send, and how long the decision takes: `ldmole bench decide`.

No processes are started, because the decision is a function of one rank's routing (`parallel.decision`).

Shapes: G linears of the input group, T tokens, P ranks, L experts per rank.
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
OUT_FEATURES = (256, 64, 64)  # out-features of q, k and v; an input group with one linear uses the first value


class Cell(NamedTuple):
    """Sizes and routing statistics of one measurement.

    Args:
        ranks: P, ranks that share the experts.
        experts: experts per linear over all ranks, P L.
        lora_rank: LoRA rank of an expert.
        tokens: T, tokens of one rank.
        active: mean number of active experts per token.
        skew: exponent of the power law of the experts' popularity; 0 is uniform.
        linears: G, number of linears in the input group.
    """

    ranks: int
    experts: int
    lora_rank: int
    tokens: int
    active: float
    skew: float
    linears: int

    def sizes(self) -> GroupSizes:
        """Return the sizes of the input group."""
        ranks = (self.lora_rank,) * self.linears
        return GroupSizes(IN_FEATURES, OUT_FEATURES[: self.linears], ranks, self.experts // self.ranks)

    def support(self) -> Tensor:
        """Return a pseudorandom support, (G, T, P, L) bool; equal cells return equal supports."""
        seed = self.ranks * self.experts + self.tokens
        held = self.experts // self.ranks
        return draw_support(self.linears, self.tokens, self.ranks, held, self.active, self.skew, seed)


CELLS = [Cell(*c) for c in itertools.product((2, 4, 8), (8, 64), (8, 32), (64, 512), (1.5, 4.0), (0.0, 1.0), (1, 3))]


def draw_support(G: int, T: int, P: int, L: int, k: float, skew: float, seed: int) -> Tensor:
    """Draw a random support: the active experts of each token in each linear.

    Args:
        G, T, P, L: sizes, as defined at the top of this module.
        k: mean number of active experts per token and linear. Each token has floor(k) or floor(k) + 1 active experts: the
            same number in every linear; which experts they are is drawn for each linear independently.
        skew: exponent of the power law of the experts' popularity; 0 is uniform.
        seed: seed of the draw.

    Returns:
        (G, T, P, L) bool.
    """
    generator = torch.Generator().manual_seed(seed)
    # Weighted sampling without replacement (Efraimidis and Spirakis, 2006): keep the experts with the largest
    # u^(1 / popularity), where u is uniform in [0, 1).
    popularity = torch.arange(1, P * L + 1).float().pow(-skew)[torch.randperm(P * L, generator=generator)]
    scores = torch.rand(G, T, P * L, generator=generator).pow(1 / popularity)
    counts = (torch.rand(T, 1, generator=generator) < k % 1).long() + int(k)
    support = scores.argsort(-1, descending=True).argsort(-1) < counts
    return support.view(G, T, P, L)


def payload(support_GTPL: Tensor, fetched_PGL: Tensor, sizes: GroupSizes) -> int:
    """Return the number of elements sent and received for the tokens of rank 0 in one forward, without counts."""
    return sum(payload_elements(support_GTPL, fetched_PGL, 0, sizes).values())


def all_or_none(support_GTPL: Tensor, fetched: bool) -> Tensor:
    """Return the fixed decision of rank 0 to fetch all experts of the other ranks, or none of them.

    Args:
        support_GTPL: (G, T, P, L) bool; only its shape is used.
        fetched: whether to fetch all.

    Returns:
        (P, G, L) bool, True for experts that rank 0 fetches.
    """
    G, _, P, L = support_GTPL.shape
    fetched_PGL = torch.full((P, G, L), fetched)
    fetched_PGL[0] = False
    return fetched_PGL


def decide(cell: Cell, repeats: int = 1) -> dict[str, float]:
    """Count the elements that each strategy sends and receives for the tokens of rank 0, and time the decision of "auto".

    Args:
        cell: sizes and routing statistics.
        repeats: number of timed decisions.

    Returns:
        Name of a strategy -> number of elements sent and received in one forward; "deciding ms" -> median
        wall-clock milliseconds of a decision. Both exclude the exchange of counts, which every strategy needs. "row per
        pair" sends an input row and returns an output row for every active pair of a token and a remote expert.
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
    """Measure all cells and print their table."""
    rows = [cell._asdict() | decide(cell, repeats) for cell in CELLS]
    times = [row["deciding ms"] for row in rows]
    title = "Elements sent and received in one forward for one rank's tokens"
    print(f"{title}; {torch.get_num_threads()} threads; {setup()}")
    print(markdown_table(rows))
    print(f"deciding: median {statistics.median(times):.2f} ms, longest {max(times):.2f} ms (wall-clock time)")
