"""Compare dispatch strategies by time and data sent, for the adapters of one decoder layer: `ldmole bench dispatch`.

All strategies run in turns on the same tokens and experts. The layer has four input groups: q, k, v; o; gate, up; down.
All inputs and outputs have width D. The baseline "row per pair" is the usual mixture-of-experts dispatch: each linear
has its own dispatch, each active (token, expert) pair sends one row, and the remote rank does not sum the outputs of a
token's experts. "replicate" holds all experts on every rank and all-reduces their gradients.

Shapes: T tokens per rank, D input features, O output features, E experts, R LoRA rank, P ranks, L experts per rank, N
rows sent, M rows received.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.method.experts import ExpertBank, apply_experts
from ldmole_dist.method.layer import Dispatch
from ldmole_dist.method.routers import Routing
from ldmole_dist.parallel.dispatch import ExpertParallel, Mode
from ldmole_dist.parallel.exchange import Payload, exchange, exchange_counts
from ldmole_dist.parallel.wire import Tally
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.selftest.tiny import relative
from ldmole_dist.study.machine import setup
from ldmole_dist.study.table import markdown_table
from ldmole_dist.study.timing import time_in_turns, timed

GROUPS = (3, 1, 2, 1)  # number of linears per input group of a decoder layer: q, k, v; o; gate, up; down
MODES: tuple[Mode, ...] = ("all_to_all", "gather", "auto")
STRATEGIES = ("row per pair", *MODES, "replicate")


class Sizes(NamedTuple):
    """Sizes of the layer.

    Args:
        tokens: T, tokens per rank.
        features: D, in- and out-features of every linear.
        experts: E, experts per linear over all ranks.
        lora_rank: R, LoRA rank of an expert.
        active: active experts per token.
    """

    tokens: int = 1024
    features: int = 512
    experts: int = 8
    lora_rank: int = 8
    active: int = 2


class LayerInputs(NamedTuple):
    """Tensors for a forward and backward of one input group.

    Args:
        x_TD: (T, D), input.
        p: (T, E) routing weights for each linear.
        all_experts: all E experts for each linear.
        held: the L experts of this rank for each linear, as copies.
        dy_TO: (T, O), gradient of the loss with respect to every linear's output.
    """

    x_TD: Tensor
    p: list[Tensor]
    all_experts: list[ExpertBank]
    held: list[ExpertBank]
    dy_TO: Tensor


def layer_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[LayerInputs]:
    """Return random inputs for each input group: the same experts on all ranks, and different tokens and routing on each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    T, D, E, R, active = sizes
    held = slice(rank * E // world, (rank + 1) * E // world)

    def draw(*shape: int, generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device)

    layer = []
    for group, linears in enumerate(GROUPS):
        shared = torch.Generator().manual_seed(group)
        own = torch.Generator().manual_seed(1000 * group + rank + 1)
        p: list[Tensor] = []
        all_experts: list[ExpertBank] = []
        held_experts: list[ExpertBank] = []
        for _ in range(linears):
            scores = draw(T, E, generator=own)
            kept = scores >= scores.topk(active, dim=1).values[:, -1:]
            p.append(scores.masked_fill(~kept, -torch.inf).softmax(-1).requires_grad_())
            A_ERD, B_EDR = draw(E, R, D, generator=shared) / D**0.5, draw(E, D, R, generator=shared)
            for banks, chosen in ((all_experts, slice(None)), (held_experts, held)):
                A, B = (bank[chosen].clone().requires_grad_() for bank in (A_ERD, B_EDR))
                banks.append(ExpertBank(A, B, 2.0))
        x_TD, dy_TO = draw(T, D, generator=own).requires_grad_(), draw(T, D, generator=own)
        layer.append(LayerInputs(x_TD, p, all_experts, held_experts, dy_TO))
    return layer


def row_per_pair(x_TD: Tensor, routing: Routing, bank: ExpertBank, group: dist.ProcessGroup, tally: Tally) -> Tensor:
    """Return the experts' output of one linear, exchanging rows for every active (token, expert) pair.

    Each pair sends one input row to the expert's rank, which returns one output row. Collective: every rank must call
    it.

    Args:
        x_TD: (T, D), input of the linear.
        routing: routing of the T tokens.
        bank: the L experts of this rank.
        group: process group over which the experts are spread.
        tally: counter for the elements sent.

    Returns:
        (T, O).
    """
    size, held = dist.get_world_size(group), len(bank.A_LRD)
    support_ET = (routing.p_TE != 0).t()
    counts_PL = support_ET.sum(1).view(size, held)
    received_PL = exchange_counts(counts_PL, group, tally)
    send, recv = counts_PL.sum(1).tolist(), received_PL.sum(1).tolist()
    expert_N, token_N = torch.nonzero_static(support_ET, size=sum(send)).unbind(1)
    (x_MD,) = exchange([Payload("rows", x_TD.index_select(0, token_N), send, recv)], group, tally)
    # Received rows are ordered by source rank, then by expert.
    local_M = torch.arange(held, device=x_TD.device).repeat(size).repeat_interleave(received_PL.flatten())
    weight_ML = torch.nn.functional.one_hot(local_M, held).to(routing.p_TE.dtype)
    y_MO = apply_experts(x_MD, weight_ML, bank, received_PL.sum(0).tolist())
    (y_NO,) = exchange([Payload("sums", y_MO, recv, send)], group, tally)
    weighted_NO = y_NO * routing.p_TE[token_N, expert_N].unsqueeze(1)
    return x_TD.new_zeros(len(x_TD), y_NO.shape[1]).index_add(0, token_N, weighted_NO)


def _adapters(name: str, inputs: LayerInputs, parallel: ExpertParallel) -> list[Tensor]:
    """Return the adapter's output (T, O) of each linear of an input group, computed with a strategy.

    If `name` is in `MODES`, `parallel` must have that mode; for "replicate" it must have no group. Collective unless `name`
    is "replicate".
    """
    # All strategies read only p; logits and lambda are placeholders.
    routings = [Routing(p_TE, p_TE, p_TE[:, 0]) for p_TE in inputs.p]
    if name == "row per pair":
        assert parallel.group is not None
        tally, pairs = Tally(parallel.wire, "layer"), zip(routings, inputs.held, strict=True)
        return [row_per_pair(inputs.x_TD, routing, bank, parallel.group, tally) for routing, bank in pairs]
    banks = inputs.all_experts if name == "replicate" else inputs.held
    dispatch = parallel.dispatch()
    decision = dispatch.decide([p_TE != 0 for p_TE in inputs.p], banks, "layer")
    return dispatch.start(inputs.x_TD, routings, banks, decision)()


def _forward_backward(name: str, inputs: LayerInputs, parallel: ExpertParallel) -> list[Tensor]:
    """Return the adapter's output of each linear of an input group, then the gradient of x and that of each linear's p.

    The gradients of p are set to 0 outside of the support. The gradients of the experts are computed,
    and all-reduced for "replicate", but not returned. Collective: every rank must call it.
    """
    outputs = _adapters(name, inputs, parallel)
    loss = torch.stack([(y * inputs.dy_TO).sum() for y in outputs]).sum()
    banks = inputs.all_experts if name == "replicate" else inputs.held
    parameters = [tensor for bank in banks for tensor in (bank.A_LRD, bank.B_LOR)]
    grad_x, *gradients = torch.autograd.grad(loss, [inputs.x_TD, *inputs.p, *parameters])
    if name == "replicate":  # data parallelism all-reduces the experts' gradients, here once per micro-batch
        for gradient in gradients[len(inputs.p) :]:
            dist.all_reduce(gradient)
    grad_p = [grad.masked_fill(p_TE == 0, 0) for grad, p_TE in zip(gradients[: len(inputs.p)], inputs.p, strict=True)]
    return [*(y.detach() for y in outputs), grad_x, *grad_p]


def measure(sizes: Sizes, turns: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Run all strategies and return one table row per strategy. Collective: every rank must call it.

    Args:
        sizes: sizes of the layer.
        turns: timed turns.
        dtype: dtype of inputs and experts.

    Returns:
        Rows with these keys:
        "strategy": name in `STRATEGIES`.
        "ms": median wall-clock milliseconds of a forward and backward, from a barrier before it to a barrier after it.
        "deciding ms": part of "ms" in which this rank decides what to send, including the exchange of counts; 0 for
            "row per pair", where this part is not measured, and for "replicate".
        "elements sent", "counts sent": elements that one forward and backward send, without counts, and the counts, summed
            over all ranks. For "replicate", the elements are not counted, but computed for a ring all-reduce of the
            gradients.
        "distance": largest relative distance of this rank's outputs and gradients of x and p from those of "replicate".
        "x faster", "x fewer elements": "ms" and "elements sent" of "row per pair", divided by those of this strategy.
    """
    process = start()
    group = expert_parallel(process.world_size).group
    layer = layer_inputs(sizes, dtype, process.device)
    parallels = {"row per pair": ExpertParallel(group), "replicate": ExpertParallel()}
    parallels |= {mode: ExpertParallel(group, mode) for mode in MODES}
    results: dict[str, list[Tensor]] = {}
    deciding: dict[str, list[float]] = {name: [] for name in STRATEGIES}

    def time_once(name: str) -> float:
        wire = parallels[name].wire
        wire.clear()
        wire.clock.on = True

        def run() -> None:
            results[name] = [tensor for inputs in layer for tensor in _forward_backward(name, inputs, parallels[name])]

        seconds = timed(run, process.device, wall=True, barrier=True)
        deciding[name].append(wire.clock.seconds("deciding"))
        return seconds

    seconds = time_in_turns(STRATEGIES, turns, time_once)
    rows: list[dict[str, Any]] = []
    for name in STRATEGIES:
        sent = parallels[name].wire.by_kind()
        counts = sent.pop("counts", 0)
        totals = torch.tensor([sent.total(), counts], device=process.device)
        dist.all_reduce(totals)
        if name == "replicate":
            # In a ring all-reduce each rank sends 2 (P - 1) / P of the elements; this is the total of all P ranks.
            parameters = sum(GROUPS) * sizes.experts * sizes.lora_rank * 2 * sizes.features
            totals[0] = 2 * parameters * (process.world_size - 1)
        row: dict[str, Any] = {"strategy": name, "ms": 1e3 * statistics.median(seconds[name])}
        row["deciding ms"] = 1e3 * statistics.median(deciding[name][1:])  # without the warm-up
        row |= {"elements sent": int(totals[0]), "counts sent": int(totals[1])}
        row["distance"] = max(relative(a, b) for a, b in zip(results[name], results["replicate"], strict=True))
        rows.append(row)
    for row in rows:
        row["x faster"] = rows[0]["ms"] / row["ms"]
        row["x fewer elements"] = rows[0]["elements sent"] / max(row["elements sent"], 1)
    return rows


def measure_overlap(sizes: Sizes, turns: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Time the dispatch with and without overlap.

    With overlap, the first frozen linear of each input group computes while the dispatch is in flight, and the local experts
    compute while the partial sums are returned. Without, each all-to-all is waited for as soon as it is started.

    Collective: every rank must call it.

    Args:
        sizes: sizes of the layer.
        turns: timed turns.
        dtype: dtype of inputs, experts and frozen linears.

    Returns:
        One row for each of the modes all_to_all and auto: median milliseconds of a forward and backward with overlap
        ("overlapped ms") and without ("after ms"), and the median over turns of the time without overlap divided by the
        time with it ("x faster").
    """
    process = start()
    group = expert_parallel(process.world_size).group
    layer = layer_inputs(sizes, dtype, process.device)
    frozen_DO = torch.randn(sizes.features, sizes.features, dtype=dtype, device=process.device) / sizes.features**0.5
    rows = []
    modes: tuple[Mode, ...] = ("all_to_all", "auto")
    for mode in modes:

        def time_once(name: str, mode: Mode = mode) -> float:
            dispatch = ExpertParallel(group, mode, overlap=name == "overlapped").dispatch()

            def run() -> None:
                for inputs in layer:
                    _forward_backward_with_frozen(inputs, dispatch, frozen_DO)

            return timed(run, process.device, wall=True, barrier=True)

        seconds = time_in_turns(("overlapped", "after"), turns, time_once)
        medians = {f"{name} ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
        ratios = (after / overlapped for overlapped, after in zip(*seconds.values(), strict=True))
        rows.append({"mode": mode, **medians, "x faster": statistics.median(ratios)})
    return rows


def _forward_backward_with_frozen(inputs: LayerInputs, dispatch: Dispatch, frozen_DO: Tensor) -> None:
    """Run the forward and backward of an input group, with `frozen_DO` as the frozen weight of each of its linears."""
    x_TD, p = inputs.x_TD, inputs.p
    decision = dispatch.decide([weights != 0 for weights in p], inputs.held, "layer")
    finish = dispatch.start(x_TD, [Routing(weights, weights, weights[:, 0]) for weights in p], inputs.held, decision)
    # Same order as in method.layer: the first frozen linear overlaps the dispatch, the other linears run after the dispatch.
    frozen = [x_TD @ frozen_DO]
    deltas = finish()
    frozen += [x_TD @ frozen_DO for _ in p[1:]]
    torch.stack([((y + delta) * inputs.dy_TO).sum() for y, delta in zip(frozen, deltas, strict=True)]).sum().backward()


def main(turns: int) -> None:
    """Measure all strategies and the overlap on 2 and 4 ranks, and print the tables of rank 0."""
    sizes = Sizes()
    for number in (2, 4):
        with LocalRanks(number) as ranks:
            print(f"\nAdapters of one decoder layer, forward + backward, wall time, {number} ranks, {sizes}; {setup()}")
            print(markdown_table(ranks.run(measure, sizes, turns, torch.float32)[0]))
            print("\nWith the frozen linears; the dispatch overlaps the first one of each input group, or none:")
            print(markdown_table(ranks.run(measure_overlap, sizes, turns, torch.float32)[0]))
