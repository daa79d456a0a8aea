"""Sparsegen: against a generic solver, gradient, Proposition 2 and edge cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ldmole_dist.method.sparsegen import sparsegen, sparsegen_on_support, sparsegen_support

TORCH_SEED = st.integers(0, 2**31 - 1)


def draw(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("lam", [-50.0, -1.6, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("E", [2, 5, 8])
def test_equal_to_generic_simplex_solver(lam: float, E: int) -> None:
    for seed in range(5):
        u = draw(seed, E).numpy()
        solution = minimize(
            lambda p, u=u: ((p - u) ** 2).sum() - lam * (p**2).sum(),
            np.full(E, 1 / E),
            jac=lambda p, u=u: 2 * (p - u) - 2 * lam * p,
            bounds=[(0, 1)] * E,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(E)},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        # At this tolerance SLSQP may stop with status 8 (positive slope) because of rounding, on some processors.
        assert solution.status in (0, 8), solution.message
        p = sparsegen(torch.from_numpy(u), torch.tensor(lam, dtype=torch.float64))
        np.testing.assert_allclose(p.numpy(), solution.x, atol=1e-6)


@pytest.mark.parametrize("lam", [-3.0, 0.0, 0.7])
@pytest.mark.parametrize("E", [1, 2, 8])
def test_gradcheck(lam: float, E: int) -> None:
    logits = draw(E, 6, E).requires_grad_()
    lam_T1 = (torch.full((6, 1), lam, dtype=torch.float64) + 0.01 * draw(1, 6, 1)).requires_grad_()
    assert torch.autograd.gradcheck(sparsegen, (logits, lam_T1), eps=1e-7, atol=1e-5)


def test_gradient_equals_closed_form() -> None:
    logits, lam, g = draw(0, 40, 8).requires_grad_(), (draw(1, 40) - 1).clamp(max=0.9).requires_grad_(), draw(2, 40, 8)
    p = sparsegen(logits, lam)
    (p * g).sum().backward()
    S, k = (p > 0).double(), (p > 0).sum(-1, keepdim=True)
    shrink = (1 - lam).unsqueeze(-1)
    mean_g = (g * S).sum(-1, keepdim=True) / k
    torch.testing.assert_close(logits.grad, S * (g - mean_g) / shrink)
    torch.testing.assert_close(lam.grad, (S * (p - 1 / k) * g).sum(-1) / (1 - lam))


@settings(max_examples=200, deadline=None)
@given(seed=TORCH_SEED, E=st.integers(2, 12), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_proposition_2_gives_the_number_of_active_experts(seed: int, E: int, scale: float) -> None:
    u = draw(seed, E, scale=scale)
    top = u.sort(descending=True).values
    for k in range(1, E + 1):
        high = 1 - float((top[:k] - top[k - 1]).sum())
        low = 1 - float((top[:k] - top[k]).sum()) if k < E else high - 10
        # Stay inside the interval: at its ends the count changes, and rounding decides.
        for share in (0.05, 0.5, 0.95):
            lam = torch.tensor(low + share * (high - low), dtype=torch.float64)
            if high - low > 1e-6 * scale and lam < 1:
                assert int((sparsegen(u, lam) > 0).sum()) == k


@settings(max_examples=200, deadline=None)
@given(seed=TORCH_SEED, E=st.integers(1, 12), lam=st.floats(-100, 0.99), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_weights_sum_to_1_with_an_active_expert(seed: int, E: int, lam: float, scale: float) -> None:
    for dtype in (torch.float32, torch.float64):
        u = draw(seed, 4, E, scale=scale).to(dtype)
        p = sparsegen(u, torch.full((4, 1), lam, dtype=dtype))
        assert (p >= 0).all() and ((p > 0).sum(-1) >= 1).all()
        torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_1e4_keep_their_differences(dtype: torch.dtype) -> None:
    u = torch.tensor([[1e4, 1e4 - 0.5, 1e4 - 2.0, -1e4]], dtype=dtype)
    p = sparsegen(u, torch.zeros(1, dtype=dtype))
    torch.testing.assert_close(p, torch.tensor([[0.75, 0.25, 0.0, 0.0]], dtype=dtype))


def test_ties_and_extreme_lambda() -> None:
    u = torch.tensor([[2.0, 2.0, 2.0, -1.0]])
    torch.testing.assert_close(sparsegen(u, torch.tensor([0.98])), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]))
    v = torch.tensor([[0.3, -0.2, 1.1, 0.9]])
    torch.testing.assert_close(sparsegen(v, torch.tensor([0.99])), torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    torch.testing.assert_close(sparsegen(v, torch.tensor([-1e6])), torch.full((1, 4), 0.25), atol=1e-5, rtol=0)
    assert sparsegen(torch.randn(5, 1), torch.randn(5).clamp(max=0.9)).equal(torch.ones(5, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted(dtype: torch.dtype) -> None:
    u, lam = torch.randn(7, 8).to(dtype), torch.zeros(7, 1, dtype=dtype)
    p = sparsegen(u, lam)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, sparsegen(u.float(), lam.float()), rtol=0, atol=0)
    assert sparsegen(u.double(), lam.double()).dtype == torch.float64


def test_lambda_with_and_without_the_last_dimension() -> None:
    u, lam = torch.randn(3, 4, 8), torch.rand(3, 4)
    assert sparsegen(u, lam).equal(sparsegen(u, lam.unsqueeze(-1)))


def test_nan_reaches_the_output() -> None:
    u = torch.randn(3, 4)
    u[1, 2] = math.nan
    p = sparsegen(u, torch.zeros(3))
    assert p[1].isnan().all() and p[0].isfinite().all() and p[2].isfinite().all()
    assert sparsegen(torch.randn(1, 4), torch.tensor([math.nan])).isnan().all()


def test_weights_on_given_support_are_nonzero_only_there() -> None:
    u, lam = torch.randn(50, 8), torch.rand(50) - 0.5
    support = sparsegen_support(u, lam)
    p = sparsegen_on_support(u + 0.3 * torch.randn(50, 8), lam, support)
    assert torch.equal(p != 0, support) and p.isfinite().all()
