"""Compare formulations of one adapted linear's experts by time and memory: `ldmole bench layer`.

The timed work is the forward and backward of y = s * sum_e p_e B_e A_e x, given x, the routing weights p, A, B and the
scaling s. The routing (router, lambda-MLP and Sparsegen) and the frozen linear are timed in the same turns, so that the
speedup of a complete adapted linear can be computed from the parts.

On a machine that runs other programs, set OMP_NUM_THREADS=1. OpenMP threads spin while they wait for each other, which
inflates the CPU time of the sparse formulation's small kernels.

Shapes: T tokens, D in-features, O out-features (equal to D here), E experts, R LoRA rank, K active experts per token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldmole_dist.method.experts import ExpertBank, apply_experts, fused_experts, sparse_experts
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.routers import SparsegenRouter
from ldmole_dist.study.machine import setup
from ldmole_dist.study.table import markdown_table
from ldmole_dist.study.timing import time_in_turns, timed

LAMBDA_HIDDEN, LAMBDA_EPS, ALPHA = 256, 0.01, 16
# A turn repeats a function until this time has passed, at most 10 times, and keeps the fastest run: on a busy machine a
# single run of small kernels can take ten times as long.
TURN_SECONDS = 1.0


class Case(NamedTuple):
    """Sizes of one comparison.

    Args:
        tokens: T.
        features: D, in- and out-features of the linear.
        experts: E.
        lora_rank: R.
        active: K, active experts per token.
    """

    tokens: int
    features: int
    experts: int
    lora_rank: int
    active: int


CASES = (Case(4096, 2048, 8, 8, 2), Case(4096, 2048, 32, 8, 2))


def einsum_experts(x_TD: Tensor, p_TE: Tensor, bank: ExpertBank) -> Tensor:
    """Return the weighted sum of the experts as the authors' code computes it, differentiated by autograd.

    This materializes the output of every expert for every token, (T, E, O), and a gradient of shape (T, E, D).

    Args:
        x_TD: (T, D), input.
        p_TE: (T, E), routing weights.
        bank: all E experts of the linear.

    Returns:
        (T, O).
    """
    x_TED = x_TD.unsqueeze(1).expand(-1, len(bank.A_LRD), -1)
    h_TER = torch.einsum("ted,erd->ter", x_TED, bank.A_LRD)
    delta_TEO = torch.einsum("ter,eor->teo", h_TER, bank.B_LOR)
    return torch.einsum("teo,te->to", delta_TEO, p_TE) * bank.scaling


def reordered_einsum(x_TD: Tensor, p_TE: Tensor, bank: ExpertBank) -> Tensor:
    """Return the result of `einsum_experts`, computed without the expansion of x and with swapped operands in the last einsum.

    Its time shows how much of the speedup comes only from the kernels that einsum selects. The memory kept for the
    backward is the same.
    """
    h_TER = torch.einsum("td,erd->ter", x_TD, bank.A_LRD)
    delta_TEO = torch.einsum("ter,eor->teo", h_TER, bank.B_LOR)
    return torch.einsum("te,teo->to", p_TE, delta_TEO) * bank.scaling


def _counts(p_TE: Tensor) -> list[int]:
    return (p_TE != 0).sum(0).tolist()


# "chosen" is what an adapted linear uses: `apply_experts` chooses "fused" or "sparse" by the counts.
FORMULATIONS: dict[str, Callable[[Tensor, Tensor, ExpertBank], Tensor]] = {
    "einsum": einsum_experts,
    "reordered": reordered_einsum,
    "fused": fused_experts,
    "sparse": lambda x_TD, p_TE, bank: sparse_experts(x_TD, p_TE, bank, _counts(p_TE)),
    "chosen": lambda x_TD, p_TE, bank: apply_experts(x_TD, p_TE, bank, _counts(p_TE)),
}


def saved_bytes(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Return the bytes of the tensors that `forward` saves for its backward.

    Args:
        forward: function that builds an autograd graph.
        inputs: tensors to leave out, because they exist before the forward.

    Returns:
        Sum over distinct storages: two views of one tensor count once.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    # Keep references to the storages: after a storage is freed, another one can get its address.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def random_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, ExpertBank]:
    """Return random x (T, D), p (T, E) with K positive weights per row, and E experts; all require gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    T, D, E, R, K = case
    top = draw(T, E).topk(K, dim=-1)
    p_TE = torch.zeros(T, E).scatter(-1, top.indices, top.values.softmax(-1))
    x, p, A, B = (t.to(device).requires_grad_() for t in (draw(T, D), p_TE, draw(E, R, D) / D**0.5, draw(E, D, R)))
    return x, p, ExpertBank(A, B, ALPHA / R)


def measure(case: Case, turns: int, device: torch.device) -> list[dict[str, object]]:
    """Time all formulations, the routing and the frozen linear, in float32.

    Args:
        case: sizes.
        turns: timed turns.
        device: device to run on.

    Returns:
        One row per formulation, then the routing and the frozen linear, then two complete adapted linears, one with
        "einsum" and one with "chosen"; their time is the sum of frozen linear, routing and experts. "ms" is the time
        of the fastest forward and backward in a turn, median over turns. In the row of a formulation, "saved MB" is the
        result of `saved_bytes` in MB, and "x faster" and "x fewer" are the time and the saved bytes of "einsum" divided by
        those of the formulation. In the last row, "x faster" is the time of the linear with "einsum" divided by that of the
        linear with "chosen". All other entries of these columns are empty.
    """
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
    parts |= {"routing": routing, "frozen linear": lambda: base(x)}
    leaves = [x, p, bank.A_LRD, bank.B_LOR, *router.parameters(), *lambda_mlp.parameters()]
    gradients = {D: torch.randn(T, D, device=device), E: torch.randn(T, E, device=device)}

    def forward_backward(name: str) -> None:
        y = parts[name]()
        y.backward(gradients[y.shape[1]])

    def fastest(name: str) -> float:
        runs: list[float] = []
        while sum(runs) < TURN_SECONDS and len(runs) < 10:
            for leaf in leaves:
                leaf.grad = None
            runs.append(timed(lambda: forward_backward(name), device))
        return min(runs)

    seconds = time_in_turns(list(parts), turns, fastest)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    for name in ("einsum", "chosen"):
        ms[f"linear with {name}"] = ms["frozen linear"] + ms["routing"] + ms[name]
    rows: list[dict[str, object]] = []
    for name, milliseconds in ms.items():
        row = {"part": name, **case._asdict(), "ms": milliseconds, "x faster": "", "saved MB": "", "x fewer": ""}
        if name in FORMULATIONS:
            row |= {"saved MB": saved[name] / 1e6, "x fewer": saved["einsum"] / saved[name]}
            row["x faster"] = ms["einsum"] / milliseconds
        rows.append(row)
    rows[-1]["x faster"] = ms["linear with einsum"] / ms["linear with chosen"]
    return rows


def main(turns: int) -> None:
    """Measure the default cases, on the GPU if there is one, and print their table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"One adapted linear, forward + backward, float32; {torch.get_num_threads()} threads; {setup()}")
    print(markdown_table([row for case in CASES for row in measure(case, turns, device)]))
