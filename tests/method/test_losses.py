"""Auxiliary losses: hand-computed values, masks, and calls without real tokens."""

import pytest
import torch

from ldmole_dist.method.losses import load_balance_loss, router_z_loss, sparsity_loss
from ldmole_dist.method.sparsegen import sparsegen


def test_balance_loss_is_1_if_uniform_and_E_if_one_expert_is_used() -> None:
    assert float(load_balance_loss(torch.full((10, 4), 0.25))) == pytest.approx(1.0)
    assert float(load_balance_loss(torch.eye(4)[torch.zeros(10, dtype=torch.long)])) == pytest.approx(4.0)


def test_balance_loss_has_no_gradient_through_frequency() -> None:
    p = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = load_balance_loss(p)  # freq = (2, 1, 0) / 3; prop = (0.8, 0.2, 0)
    assert float(loss) == pytest.approx(3 * (2 / 3 * 0.8 + 1 / 3 * 0.2))
    loss.backward()
    torch.testing.assert_close(p.grad, torch.tensor([[2.0, 1.0, 0.0]] * 2) / 3 * 3 / 2)


def test_sparsity_loss_is_zero_iff_at_most_k_experts_are_active() -> None:
    logits, lam = torch.randn(500, 8), torch.rand(500) * 2 - 1
    at_most_2 = (sparsegen(logits, lam) > 0).sum(-1) <= 2
    for t in range(500):
        assert (float(sparsity_loss(logits[t : t + 1], lam[t : t + 1], 2)) == 0) == bool(at_most_2[t])


def test_sparsity_loss_raises_lambda_and_ignores_logits() -> None:
    logits, lam = torch.randn(20, 8, requires_grad=True), torch.full((20,), -3.0, requires_grad=True)
    sparsity_loss(logits, lam, 2).backward()
    assert (lam.grad < 0).all() and logits.grad is None


def test_sparsity_loss_with_target_of_all_experts_is_zero() -> None:
    lam = torch.randn(5, requires_grad=True)
    loss = sparsity_loss(torch.randn(5, 4), lam, 4)
    loss.backward()
    assert float(loss) == 0 and lam.grad.equal(torch.zeros(5))


@pytest.mark.parametrize("loss", ["balance", "sparsity", "z"])
def test_padding_is_masked_even_if_nan(loss: str) -> None:
    logits, lam = torch.randn(6, 8), torch.rand(6) - 2
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)

    def value(logits: torch.Tensor, lam: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if loss == "balance":
            return load_balance_loss(sparsegen(logits, lam), mask)
        return sparsity_loss(logits, lam, 2, mask) if loss == "sparsity" else router_z_loss(logits, mask)

    expected = value(logits[mask], lam[mask], None)
    logits[~mask], lam[~mask] = float("nan"), float("nan")
    torch.testing.assert_close(value(logits, lam, mask), expected)


def test_loss_without_real_tokens_is_zero_and_in_the_graph() -> None:
    logits, lam = torch.randn(3, 4, requires_grad=True), torch.rand(3, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    p = sparsegen(logits, lam)
    total = load_balance_loss(p, none) + sparsity_loss(logits, lam, 2, none) + router_z_loss(logits, none)
    assert float(total) == 0
    total.backward()
    assert logits.grad.equal(torch.zeros(3, 4)) and lam.grad.equal(torch.zeros(3))
    empty = torch.zeros(0, 4, requires_grad=True)
    assert float(load_balance_loss(empty) + router_z_loss(empty)) == 0
