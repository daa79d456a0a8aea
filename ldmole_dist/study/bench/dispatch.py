"""The dispatch benchmark behind `ldmole bench dispatch`: what goes over the wire, and how long the adapters of a layer take.

Every strategy runs the same decoder layer's input groups (q, k, v; o; gate, up; down; all widths d) on the same tokens and
experts, in turns, in one run. "row per pair" is what a mixture-of-experts system without our dispatch does: one dispatch
for each linear, one row for each (token, expert), no sums on the remote rank.

Shapes: T tokens of a rank, d features, E experts, R rank, P ranks, N rows.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.method.experts import ExpertBank, apply_experts
from ldmole_dist.method.routers import Routing
from ldmole_dist.parallel.dispatch import ExpertParallel, Mode
from ldmole_dist.parallel.exchange import Payload, exchange, exchange_counts
from ldmole_dist.parallel.wire import Tally, Wire
from ldmole_dist.selftest.local_ranks import LocalRanks

GROUPS = (3, 1, 2, 1)  # linears of each input group of a decoder layer
STRATEGIES = ("row per pair", "all_to_all", "gather", "auto", "replicate")


class Sizes(NamedTuple):
    """Of one benchmark: T tokens a rank, d features, E experts, R their rank, k active ones."""

    tokens: int = 1024
    features: int = 512
    experts: int = 8
    rank: int = 8
    active: int = 2


class Measured(NamedTuple):
    """Of one strategy: median seconds of forward and backward of a decoder layer's adapters and, part of them, of deciding
    (the exchange of counts included), elements sent by all ranks (counts apart), and the largest relative distance of an
    output or gradient to "replicate"."""

    seconds: float
    deciding: float
    elements: int
    counts: int
    distance: float


def row_per_pair(x_TD: Tensor, routing: Routing, bank: ExpertBank, group: dist.ProcessGroup, tally: Tally) -> Tensor:
    """One linear's experts, with a row out and a row back for every (token, expert)."""
    size, held = dist.get_world_size(group), len(bank.A_LRD)
    support_ET = (routing.p_TE != 0).t()
    counts_PL = support_ET.sum(1).view(size, held)
    received_PL = exchange_counts(counts_PL, group, tally)
    send, recv = counts_PL.sum(1).tolist(), received_PL.sum(1).tolist()
    expert_N, token_N = torch.nonzero_static(support_ET, size=sum(send)).unbind(1)
    (x_MD,) = exchange([Payload("rows", x_TD.index_select(0, token_N), send, recv)], group, tally)
    # Rows come ordered by source, then expert.
    local_M = torch.arange(held, device=x_TD.device).repeat(size).repeat_interleave(received_PL.flatten())
    weight_ML = torch.nn.functional.one_hot(local_M, held).to(routing.p_TE.dtype)
    y_MO = apply_experts(x_MD, weight_ML, bank, received_PL.sum(0).tolist())
    (y_NO,) = exchange([Payload("sums", y_MO, recv, send)], group, tally)
    weighted_NO = y_NO * routing.p_TE[token_N, expert_N].unsqueeze(1)
    return x_TD.new_zeros(len(x_TD), y_NO.shape[1]).index_add(0, token_N, weighted_NO)


def measure(sizes: Sizes, turns: int, dtype: torch.dtype) -> dict[str, Measured]:
    """Run all strategies on this rank and its peers; every rank calls it."""
    process = start()
    parallel = expert_parallel(process.world_size)
    assert parallel.group is not None, "a dispatch needs at least two ranks"
    layer = [layer_inputs(sizes, group, linears, dtype, process.device) for group, linears in enumerate(GROUPS)]
    times: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    deciding: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    sent: dict[str, Counter[str]] = {}
    results: dict[str, list[Tensor]] = {}
    for turn in range(turns + 1):
        for name in STRATEGIES:
            strategy = _Strategy(name, parallel.group)
            dist.barrier()
            begun = time.perf_counter()
            results[name] = [value for inputs in layer for value in inputs.run(strategy, name == "replicate")]
            synchronize(process.device)
            dist.barrier()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - begun)
                deciding[name].append(strategy.deciding)
            sent[name] = strategy.wire.by_kind()
    measured = {}
    for name in STRATEGIES:
        counts = sent[name].pop("counts", 0)
        totals = torch.tensor([sum(sent[name].values()), counts], device=process.device)
        dist.all_reduce(totals)
        pairs = zip(results[name], results["replicate"], strict=True)
        distance = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
        if name == "replicate":  # gradients of all experts, reduced once for each optimizer step: 2 N (P - 1) / P
            banks = sum(GROUPS) * sizes.experts * sizes.rank * 2 * sizes.features
            totals[0] = 2 * banks * (process.world_size - 1)
        seconds = statistics.median(times[name]), statistics.median(deciding[name])
        measured[name] = Measured(*seconds, int(totals[0]), int(totals[1]), distance)
    return measured


class LayerInputs(NamedTuple):
    """One input group: tokens, logits, the whole banks and the held slices of them."""

    x_TD: Tensor
    p: list[Tensor]
    whole: list[ExpertBank]
    held: list[ExpertBank]
    dy_TO: Tensor

    def run(self, strategy: _Strategy, replicated: bool) -> list[Tensor]:
        """Forward and backward: outputs, then gradients of x and p."""
        x_TD, p = self.x_TD.requires_grad_(), [weights.requires_grad_() for weights in self.p]
        banks = self.whole if replicated else self.held
        outputs = strategy(x_TD, [Routing(weights, weights, weights[:, 0]) for weights in p], banks)
        loss = torch.stack([(y * self.dy_TO).sum() for y in outputs]).sum()
        parameters = [tensor for bank in banks for tensor in (bank.A_LRD, bank.B_LOR)]
        gradients = torch.autograd.grad(loss, [x_TD, *p, *parameters])
        if replicated:  # what data parallelism does to replicated experts; once a step, here once a micro-batch
            for gradient in gradients[1 + len(p) :]:
                dist.all_reduce(gradient)
        grad_p = [g.masked_fill(weights == 0, 0) for g, weights in zip(gradients[1 : 1 + len(p)], p, strict=True)]
        return [y.detach() for y in outputs] + [gradients[0], *grad_p]


def layer_inputs(sizes: Sizes, group: int, linears: int, dtype: torch.dtype, device: torch.device) -> LayerInputs:
    rank, world = dist.get_rank(), dist.get_world_size()
    shared = torch.Generator().manual_seed(group)
    own = torch.Generator().manual_seed(1000 * group + rank + 1)
    T, d, E, R = sizes.tokens, sizes.features, sizes.experts, sizes.rank

    def draw(*shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device)

    p, whole, held = [], [], []
    for _ in range(linears):
        scores = draw(T, E, generator=own)
        kept = scores >= scores.topk(sizes.active, dim=1).values[:, -1:]
        p.append(scores.masked_fill(~kept, -torch.inf).softmax(-1))
        A, B = draw(E, R, d, generator=shared) / d**0.5, draw(E, d, R, generator=shared)
        mine = slice(rank * E // world, (rank + 1) * E // world)
        whole.append(ExpertBank(A.requires_grad_(), B.requires_grad_(), 2.0))
        held.append(
            ExpertBank(A.detach()[mine].clone().requires_grad_(), B.detach()[mine].clone().requires_grad_(), 2.0)
        )
    return LayerInputs(draw(T, d, generator=own), p, whole, held, draw(T, d, generator=own))


class _Strategy:
    """A way to bring tokens and experts of an input group together; counts what it sends and how long it decides."""

    def __init__(self, name: str, group: dist.ProcessGroup) -> None:
        self.name, self.group, self.wire, self.deciding = name, group, Wire(), 0.0
        modes: dict[str, Mode] = {"all_to_all": "all_to_all", "gather": "gather", "auto": "auto"}
        parallel = ExpertParallel(group, modes[name], wire=self.wire) if name in modes else ExpertParallel()
        self.dispatch = parallel.dispatch()

    def __call__(self, x_TD: Tensor, routings: Sequence[Routing], banks: Sequence[ExpertBank]) -> list[Tensor]:
        if self.name == "row per pair":
            tally = Tally(self.wire, "layer")
            return [row_per_pair(x_TD, r, b, self.group, tally) for r, b in zip(routings, banks, strict=True)]
        begun = time.perf_counter()
        decision = self.dispatch.decide([routing.p_TE != 0 for routing in routings], banks, "layer")
        synchronize(x_TD.device)
        self.deciding += time.perf_counter() - begun
        return self.dispatch.start(x_TD, routings, banks, decision)()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def bench_dispatch(
    ranks: Sequence[int] = (2, 4), sizes: Sizes | None = None, turns: int = 5, dtype: torch.dtype = torch.float32
) -> dict[int, dict[str, Measured]]:
    """Measure on groups of ranks of this machine.

    Args:
        ranks: sizes of the expert-parallel groups.
        sizes: of the layer.
        turns: timed, after one that warms up.
        dtype: of activations and experts.

    Returns:
        For each number of ranks, the strategies.
    """
    table = {}
    for number in ranks:
        with LocalRanks(number) as processes:
            table[number] = processes.run(measure, sizes or Sizes(), turns, dtype)[0]
    return table


def print_table(table: dict[int, dict[str, Measured]], sizes: Sizes) -> None:
    """Print what `bench_dispatch` measured."""
    print(
        f"adapters of one decoder layer (input groups of {GROUPS} linears), forward + backward, T={sizes.tokens} a rank, "
        f"d={sizes.features}, E={sizes.experts}, r={sizes.rank}, k={sizes.active}; torch {torch.__version__}"
    )
    print(
        "deciding: what moves, part of ms; elements: sent by all ranks, counts apart; faster, fewer: than a row per pair; "
        "distance: to replicate, worst"
    )
    for ranks, strategies in table.items():
        base = strategies["row per pair"]
        columns = f"{'ms':>8} {'deciding':>8} {'faster':>7} {'elements':>12} {'fewer':>7} {'counts':>8} {'distance':>9}"
        print(f"\nP={ranks:<14} {columns}")
        for name, m in strategies.items():
            print(
                f"  {name:14} {1e3 * m.seconds:8.1f} {1e3 * m.deciding:8.1f} {base.seconds / m.seconds:7.1f} {m.elements:12,} "
                f"{base.elements / max(m.elements, 1):7.1f} {m.counts:8,} {m.distance:9.1e}"
            )
