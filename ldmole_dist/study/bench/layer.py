"""Time and memory of the expert part of one adapted linear, by formulation: `ldmole bench layer`.

Timed is forward + backward of what LD-MoLE adds besides router and lambda-MLP: y = s * sum_e p_e B_e A_e x, given x, p,
A and B. The frozen linear and the routing are timed beside it, so that nobody takes a ratio of the experts for one of
the whole layer.

On a machine that does other work too, set OMP_NUM_THREADS=1: threads that wait for each other spin, and the small kernels
of the sparse formulation then measure the neighbours.

Shapes: T tokens, D in- and out-features, O out-features, E experts, R LoRA rank, K active experts of a token.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldmole_dist.method.experts import ExpertBank, apply_experts, fused_experts, sparse_experts
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.routers import SparsegenRouter

LAMBDA_HIDDEN, LAMBDA_EPS, ALPHA = 256, 0.01, 16
# What is fast runs this long, at most 10 times, in one turn, and its fastest run counts: on a machine that does other
# work too, a single run of small kernels can take ten times as long.
TURN_MS = 1000


class Case(NamedTuple):
    """Sizes of one comparison."""

    tokens: int
    features: int
    experts: int
    rank: int
    active: int


DEFAULT_CASES = (Case(4096, 2048, 8, 8, 2), Case(4096, 2048, 32, 8, 2))
LARGE_CASE = Case(4096, 2048, 64, 16, 2)  # only when asked for: einsum takes many seconds and 10 GB here


@dataclass(frozen=True)
class Result:
    """What one part of the layer cost.

    Attributes:
        case: the sizes.
        part: a formulation of the experts, "routing" (router, lambda-MLP and Sparsegen) or "base" (the frozen linear).
        milliseconds: the fastest run of each turn, forward + backward; CPU time of all threads, wall clock on a GPU.
        saved_bytes: kept from forward to backward, beyond x, p, A and B; 0 where it was not measured.
    """

    case: Case
    part: str
    milliseconds: tuple[float, ...]
    saved_bytes: int = 0

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.milliseconds)


def einsum_experts(x_TD: Tensor, p_TE: Tensor, bank: ExpertBank) -> Tensor:
    """The experts' sum as the authors' code forms it, in plain autograd: every expert's output for every token exists.

    So does a gradient (T, E, D), as the rows are expanded over the experts first.

    Args:
        x_TD: (T, D).
        p_TE: (T, E).
        bank: all E experts.

    Returns:
        (T, O).
    """
    x_TED = x_TD.unsqueeze(1).expand(-1, len(bank.A_LRD), -1)
    h_TER = torch.einsum("ted,erd->ter", x_TED, bank.A_LRD)
    delta_TEO = torch.einsum("ter,eor->teo", h_TER, bank.B_LOR)
    return torch.einsum("teo,te->to", delta_TEO, p_TE) * bank.scaling


def reordered_einsum(x_TD: Tensor, p_TE: Tensor, bank: ExpertBank) -> Tensor:
    """`einsum_experts` without the expansion and with the last operands swapped, which is kinder to the kernels on CPU:
    what of the gain a few characters would have given. It keeps as much."""
    h_TER = torch.einsum("td,erd->ter", x_TD, bank.A_LRD)
    delta_TEO = torch.einsum("ter,eor->teo", h_TER, bank.B_LOR)
    return torch.einsum("te,teo->to", p_TE, delta_TEO) * bank.scaling


def _sparse(x_TD: Tensor, p_TE: Tensor, bank: ExpertBank) -> Tensor:
    return sparse_experts(x_TD, p_TE, bank, _counts(p_TE))


def _chosen(x_TD: Tensor, p_TE: Tensor, bank: ExpertBank) -> Tensor:
    return apply_experts(x_TD, p_TE, bank, _counts(p_TE))


def _counts(p_TE: Tensor) -> list[int]:
    return (p_TE != 0).sum(0).tolist()


FORMULATIONS: dict[str, Callable[[Tensor, Tensor, ExpertBank], Tensor]] = {
    "einsum": einsum_experts,
    "reordered": reordered_einsum,
    "fused": fused_experts,
    "sparse": _sparse,
    "chosen": _chosen,
}


def bench_layer(cases: Sequence[Case] = DEFAULT_CASES, repeats: int = 3) -> list[Result]:
    """Time every part of every case on this machine, in float32, on the GPU if there is one.

    Args:
        cases: sizes.
        repeats: turns of each part after one that does not count; the parts alternate.

    Returns:
        One result for each case and part, formulations first.
    """
    return [result for case in cases for result in _bench_case(case, repeats, _device())]


def saved_bytes(forward: Callable[[], Tensor], given: Sequence[Tensor]) -> int:
    """Bytes that `forward` keeps for its backward.

    Args:
        forward: builds a graph.
        given: tensors that are there anyway and do not count.

    Returns:
        Sum over distinct storages, so that two views of one tensor count once.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them: a freed one could hand its address to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def random_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, ExpertBank]:
    """x (T, D), p (T, E) with K weights above 0 in each row, and a bank with B drawn too; all want gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    T, D, E, R, K = case
    top = draw(T, E).topk(K, dim=-1)
    p_TE = torch.zeros(T, E).scatter(-1, top.indices, top.values.softmax(-1))
    x, p, A, B = (t.to(device).requires_grad_() for t in (draw(T, D), p_TE, draw(E, R, D) / D**0.5, draw(E, D, R)))
    return x, p, ExpertBank(A, B, ALPHA / R)


def _bench_case(case: Case, repeats: int, device: torch.device) -> list[Result]:
    T, D, E, _, _ = case
    x, p, bank = random_inputs(case, device)
    base = nn.Linear(D, D, bias=False, device=device).requires_grad_(False)
    router, lambda_mlp = SparsegenRouter(D, E, device), LambdaMLP(D, LAMBDA_HIDDEN, LAMBDA_EPS, device)
    router.reset(torch.Generator().manual_seed(1))
    lambda_mlp.reset(torch.Generator().manual_seed(2), "live")

    def routing() -> Tensor:
        logits, lam = router(x), lambda_mlp(x)
        return router.weigh(logits, lam, router.decide(logits, lam)).p_TE

    parts: dict[str, Callable[[], Tensor]] = {
        name: lambda formulation=formulation: formulation(x, p, bank)  # type: ignore[misc]
        for name, formulation in FORMULATIONS.items()
    }
    saved = {name: saved_bytes(forward, (x, p, bank.A_LRD, bank.B_LOR)) for name, forward in parts.items()}
    parts |= {"routing": routing, "base": lambda: base(x)}
    leaves = [x, p, bank.A_LRD, bank.B_LOR, *router.parameters(), *lambda_mlp.parameters()]
    gradients = {D: torch.randn(T, D, device=device), E: torch.randn(T, E, device=device)}

    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):
        for name, forward in parts.items():
            turn: list[float] = []
            while sum(turn) < TURN_MS and len(turn) < 10:
                for leaf in leaves:
                    leaf.grad = None
                turn.append(_timed(forward, gradients, device))
            times[name].append(min(turn))
    return [Result(case, name, tuple(times[name][1:]), saved.get(name, 0)) for name in parts]


def _timed(forward: Callable[[], Tensor], gradients: dict[int, Tensor], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait_for(device)
    start = clock()
    y = forward()
    y.backward(gradients[y.shape[1]])
    _wait_for(device)
    return (clock() - start) * 1e3


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def print_table(results: Sequence[Result]) -> None:
    """Print what `bench_layer` returned: one block for each case, ratios to `einsum`."""
    device = _device()
    if device.type == "cuda":
        machine, clock = torch.cuda.get_device_name(device), "wall clock"
    else:
        machine, clock = f"cpu ({platform.machine()}), threads: {torch.get_num_threads()}", "CPU time of all threads"
    print(f"experts of one adapted linear, forward + backward, float32, on {machine}, torch {torch.__version__}")
    print(f"ms: {clock}, median of {len(results[0].milliseconds)} turns; saved: for the backward, beyond x, p, A, B")
    for case in dict.fromkeys(result.case for result in results):
        parts = {result.part: result for result in results if result.case == case}
        einsum = parts["einsum"]
        T, D, E, R, K = case
        print(f"\nT={T} d={D} E={E} r={R} k={K}, d_out/r={D / R:g}")
        print(f"  {'':9}{'ms':>10}{'x faster':>10}{'saved MB':>11}{'x fewer':>9}")
        for name in FORMULATIONS:
            part = parts[name]
            print(
                f"  {name:9}{part.median:10.1f}{einsum.median / part.median:10.1f}"
                f"{part.saved_bytes / 1e6:11.2f}{einsum.saved_bytes / part.saved_bytes:9.0f}"
            )
        base, routing, chosen = (parts[name].median for name in ("base", "routing", "chosen"))
        whole, with_einsum = base + routing + chosen, base + routing + einsum.median
        print(f"  whole linear: base {base:.1f} + routing {routing:.1f} + chosen {chosen:.1f} = {whole:.1f} ms,")
        print(
            f"  {(routing + chosen) / whole:.0%} of it the adapter; with einsum experts {with_einsum:.1f} ms, "
            f"{with_einsum / whole:.1f} times as much"
        )
