"""The frozen product of routed experts: equal to one product for each base expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldmole_dist.tuner.grouped_linear import grouped_linear

ENDS = torch.tensor([3, 3, 7, 10], dtype=torch.int32)  # the second base expert has no rows


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("D", "O", "dtype"),
    [(16, 24, torch.float32), (5, 7, torch.float32), (16, 24, torch.float64), (16, 8, torch.bfloat16)],
)
def test_equals_one_product_for_each_expert(D: int, O: int, dtype: torch.dtype, transposed: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(10, D, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(4, O, D, generator=draw).to(dtype)
    grad = torch.randn(10, O, generator=draw).to(dtype)
    expected = torch.cat([x[:3] @ weight[0].t(), x[3:7] @ weight[2].t(), x[7:] @ weight[3].t()])
    expected_grad = torch.autograd.grad(expected, x, grad)[0]
    found = grouped_linear(x, weight.transpose(1, 2).contiguous() if transposed else weight, ENDS, transposed)
    for a, b in ((found, expected), (torch.autograd.grad(found, x, grad)[0], expected_grad)):
        assert a.dtype == dtype and (a - b).norm() <= torch.finfo(dtype).eps * 4 * b.norm()


def test_weights_can_be_released_between_forward_and_backward() -> None:
    # As ZeRO-3 does: it frees the storage of a gathered parameter and gathers it again for the backward.
    weight = torch.nn.Parameter(torch.randn(4, 8, 16), requires_grad=False)
    x = torch.randn(10, 16, requires_grad=True)
    y, gathered = grouped_linear(x, weight, ENDS, False), weight.data
    weight.data = torch.empty(0)
    kept: list[Tensor] = list(y.grad_fn.saved_tensors)  # type: ignore[union-attr]
    assert all(tensor.untyped_storage().nbytes() < gathered.nbytes for tensor in kept)
    weight.data = gathered
    (found,) = torch.autograd.grad(y.sum(), x)
    assert found.allclose(weight.sum(1)[[0] * 3 + [2] * 4 + [3] * 3], atol=1e-5)


def test_input_is_computed_in_the_dtype_of_the_weights() -> None:
    x = torch.randn(10, 16, requires_grad=True)
    y = grouped_linear(x, torch.randn(4, 8, 16, dtype=torch.bfloat16), ENDS, False)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
