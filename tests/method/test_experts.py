"""The two formulations of the experts: equal outputs and gradients, and the tensors saved for the backward."""

import pytest
import torch
from torch import Tensor

from ldmole_dist.method.experts import ExpertBank, apply_experts, fused_experts, fused_is_always_faster, sparse_experts
from ldmole_dist.method.sparsegen import sparsegen

T, D, O, E, R = 21, 10, 12, 6, 3


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, ExpertBank]:
    x, p = torch.randn(T, D, dtype=dtype), sparsegen(torch.randn(T, E, dtype=dtype), torch.zeros(T, dtype=dtype))
    p[:, 4] = 0  # an expert without tokens
    p[3] = 0  # a token without experts
    bank = ExpertBank(
        torch.randn(E, R, D, dtype=dtype).requires_grad_(), torch.randn(E, O, R, dtype=dtype).requires_grad_(), 2.0
    )
    return x.requires_grad_(), p.requires_grad_(), bank


def direct(x: Tensor, p: Tensor, bank: ExpertBank) -> Tensor:
    return bank.scaling * torch.einsum("te,eor,erd,td->to", p, bank.B_LOR, bank.A_LRD, x)


def counts(p: Tensor) -> list[int]:
    return (p != 0).sum(0).tolist()


@pytest.mark.parametrize("formulation", ["fused", "sparse"])
def test_outputs_and_gradients_equal_definition(formulation: str) -> None:
    x, p, bank = inputs()
    dy = torch.randn(T, O, dtype=torch.float64)
    leaves = (x, p, bank.A_LRD, bank.B_LOR)
    expected = direct(x, p, bank)
    expected_grads = torch.autograd.grad((expected * dy).sum(), leaves)
    y = fused_experts(x, p, bank) if formulation == "fused" else sparse_experts(x, p, bank, counts(p))
    grads = torch.autograd.grad((y * dy).sum(), leaves)
    torch.testing.assert_close(y, expected)
    for name, grad, reference in zip(("x", "p", "A", "B"), grads, expected_grads, strict=True):
        if name == "p" and formulation == "sparse":
            reference = reference.masked_fill(p == 0, 0)  # routers ignore gradients off the support
        torch.testing.assert_close(grad, reference)


def test_gradcheck_fused() -> None:
    x, p, bank = inputs()
    assert torch.autograd.gradcheck(
        lambda *a: fused_experts(a[0], a[1], ExpertBank(a[2], a[3], 2.0)), (x, p, bank.A_LRD, bank.B_LOR)
    )


@pytest.mark.parametrize("formulation", ["fused", "sparse"])
def test_parameters_get_gradients_without_tokens(formulation: str) -> None:
    x, p, bank = inputs()
    x, p = x[:0], p[:0]
    y = fused_experts(x, p, bank) if formulation == "fused" else sparse_experts(x, p, bank, [0] * E)
    y.sum().backward()
    assert bank.A_LRD.grad.equal(torch.zeros_like(bank.A_LRD)) and bank.B_LOR.grad.equal(torch.zeros_like(bank.B_LOR))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_with_float32_parameters(dtype: torch.dtype) -> None:
    x, p, bank = inputs(torch.float32)
    xh = x.detach().to(dtype).requires_grad_()
    reference = direct(xh.detach().float(), p.detach(), bank)
    for y in (fused_experts(xh, p, bank), sparse_experts(xh, p, bank, counts(p))):
        grads = torch.autograd.grad(y.float().square().sum(), (xh, p, bank.A_LRD, bank.B_LOR))
        assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, torch.float32]
        assert y.dtype == dtype and float((y.float() - reference).norm() / reference.norm()) < 0.02


@pytest.mark.parametrize(("formulation", "hidden"), [("fused", T * E * R), ("sparse", None)])
def test_saves_only_x_p_and_h(formulation: str, hidden: int | None) -> None:
    x, p, bank = inputs()
    given = {t.data_ptr() for t in (x, p, bank.A_LRD, bank.B_LOR)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused_experts(x, p, bank) if formulation == "fused" else sparse_experts(x, p, bank, counts(p))
    own = {pointer: size for pointer, size in kept.items() if pointer not in given}
    assert list(own.values()) == [hidden if hidden is not None else sum(counts(p)) * R] and y.requires_grad


def test_formulation_follows_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    x, p, bank = inputs()
    expected = direct(x, p, bank)
    for threshold in (0, 10**6):
        monkeypatch.setattr("ldmole_dist.method.experts.FUSED_THRESHOLD_ON_CPU", threshold)
        y = apply_experts(x, p, bank, counts(p))
        torch.testing.assert_close(y, expected)
        assert ("Fused" if threshold else "Sparse") in type(y.grad_fn).__name__


def test_accelerators_use_fused() -> None:
    """Uses the meta device, which has autograd but needs no GPU."""
    num_experts, tokens = 512, 8
    for device, name in (("cpu", "Sparse"), ("meta", "Fused")):
        x = torch.ones(tokens, D, device=device)
        p = torch.eye(tokens, num_experts, device=device).requires_grad_()
        bank = ExpertBank(
            torch.ones(num_experts, R, D, device=device), torch.ones(num_experts, O, R, device=device), 1.0
        )
        assert fused_is_always_faster(bank) == (name == "Fused")
        y = apply_experts(x, p, bank, [1] * tokens + [0] * (num_experts - tokens))
        assert name in type(y.grad_fn).__name__
