"""Tests of `ldmole bench layer`: the baseline is the authors' computation, results are equal, and saved bytes are exact."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.layer import LocalDispatch
from ldmole_dist.method.losses import load_balance_loss, sparsity_loss
from ldmole_dist.method.routers import Routing
from ldmole_dist.study.bench.layer import (
    FORMULATIONS,
    Case,
    measure,
    random_inputs,
    saved_bytes,
)
from tests.method.test_golden import FILES, build, distance, load

SMALL = Case(tokens=96, features=64, experts=8, lora_rank=4, active=2)
CPU = torch.device("cpu")


class Formulation(LocalDispatch):
    """The local dispatch with a formulation of the benchmark."""

    def __init__(self, name: str) -> None:
        self.function = FORMULATIONS[name]

    def __call__(self, x_TD: Tensor, routings, banks, plan) -> list[Tensor]:
        return [self.function(x_TD, r.p_TE, bank) for r, bank in zip(routings, banks, strict=True)]


@pytest.mark.parametrize("formulation", ["einsum", "reordered"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_einsum_baseline_matches_the_stored_results_of_the_authors(path: Path, formulation: str) -> None:
    g, meta = load(path)
    layer, context = build(g, meta)
    layer.dispatch = Formulation(formulation)
    seen: list[Routing] = []
    context.record_routing = lambda names, routing, *rest: seen.extend(routing.by_linear())
    x = g["x"].clone().requires_grad_()
    y = layer.forward_with_adapter(x, "default")
    (routing,) = seen
    # The stored gradient of x includes the auxiliary losses, which the authors' code averages over padding too.
    balance = load_balance_loss(routing.p_TE, g["attention_mask"].flatten())
    sparsity = sparsity_loss(routing.logits_TE, routing.lam_T, int(meta["k_target"]))
    ((y * g["dy"]).sum() + float(meta["lb_coef"]) * balance + float(meta["sparsity_coef"]) * sparsity).backward()
    assert distance(y, g["y"]) < 1e-5
    adapter = layer.ldmole_adapters["default"]
    for name, value in (("A", adapter.lora_A), ("B", adapter.lora_B), ("x", x)):
        assert value.grad is not None and distance(value.grad, g[f"grad_{name}"]) < 1e-5, name


@pytest.mark.parametrize("formulation", [name for name in FORMULATIONS if name != "einsum"])
def test_every_formulation_equals_einsum_in_float64(formulation: str) -> None:
    x, p, bank = random_inputs(SMALL, CPU)
    leaves = [t.detach().double().requires_grad_() for t in (x, p, bank.A_LRD, bank.B_LOR)]
    dy = torch.randn(SMALL.tokens, SMALL.features, dtype=torch.float64)
    results = []
    for name in ("einsum", formulation):
        y = FORMULATIONS[name](leaves[0], leaves[1], ExpertBank(leaves[2], leaves[3], bank.scaling))
        dx, dp, dA, dB = torch.autograd.grad((y * dy).sum(), leaves)
        results.append((y, dx, dp.masked_fill(leaves[1] == 0, 0), dA, dB))  # no router uses dp off the support
    for value, reference in zip(*results, strict=True):
        torch.testing.assert_close(value, reference)


@pytest.mark.parametrize("case", [SMALL, Case(64, 128, 32, 8, 2)])
def test_saved_bytes_are_fewer_by_d_out_over_r(case: Case) -> None:
    x, p, bank = random_inputs(case, CPU)
    given = (x, p, bank.A_LRD, bank.B_LOR)
    saved = {name: saved_bytes(lambda f=f: f(x, p, bank), given) for name, f in FORMULATIONS.items()}
    T, D, E, R, K = case
    assert saved["einsum"] == 4 * T * E * (D + R)  # h (T, E, R) and every expert's output (T, E, O)
    assert saved["fused"] == 4 * T * E * R and saved["sparse"] == 4 * T * K * R
    assert saved["einsum"] / saved["fused"] >= D / R and saved["einsum"] / saved["sparse"] >= D / R


def test_saved_bytes_counts_a_storage_once_and_leaves_out_inputs() -> None:
    x, w = torch.randn(10, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)

    def forward() -> Tensor:
        y = x.exp()  # saves its result
        return (y * y[:5].sum()).sum() + (x @ w).sum()  # saves y again, and the sum

    assert saved_bytes(forward, (x, w)) == 4 * 100 + 4
    assert saved_bytes(forward, (x,)) == 4 * 200 + 4


def test_inputs_have_k_active_experts() -> None:
    _, p, _ = random_inputs(SMALL, CPU)
    assert ((p > 0).sum(-1) == SMALL.active).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(SMALL.tokens))


def test_rows_have_every_part_and_ratios_to_einsum() -> None:
    rows = {row["part"]: row for row in measure(Case(16, 32, 4, 2, 2), turns=2, device=CPU)}
    assert [*rows] == [*FORMULATIONS, "routing", "frozen linear", "linear with einsum", "linear with chosen"]
    assert rows["einsum"]["x faster"] == rows["einsum"]["x fewer"] == 1.0
    parts = sum(rows[name]["ms"] for name in ("routing", "frozen linear", "chosen"))
    assert rows["linear with chosen"]["ms"] == pytest.approx(parts)
