"""Routers and the lambda-MLP: initialization, bounds, dtypes, and the tensors saved for the backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.linear import InputDtypeLinear, linear
from ldmole_dist.method.routers import SparsegenRouter
from ldmole_dist.method.sparsegen import sparsegen

D, H, E, T = 64, 256, 8, 2000
MEAN = float(F.logsigmoid(torch.tensor(-2.5))) + 0.99  # -1.59


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(init: str, seed: int = 0, eps: float = 0.01) -> LambdaMLP:
    module = LambdaMLP(D, H, eps)
    module.reset(generator(seed), init)
    return module


def rows(scale: float = 1.0) -> Tensor:
    return torch.randn(T, D, generator=generator(9)) * scale


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_lambda_stays_below_one_minus_eps(eps: float) -> None:
    lam = mlp("live", eps=eps).double()(rows(scale=1e3).double()).detach()
    assert lam.shape == (T,) and float(lam.max()) <= 1 - eps and float(lam.max()) > 1 - eps - 0.01
    # Sparsegen is still defined at these values.
    assert sparsegen(rows()[:, :E], lam).sum(-1).sub(1).abs().max() < 1e-5


def test_authors_init_is_one_constant() -> None:
    module = mlp("authors")
    assert all(bias.eq(-2.5).all() for bias in (module.fc1.bias, module.fc2.bias))
    with torch.no_grad():
        alive = (module.fc1(rows()) > 0).float().mean()
        lam = module(rows())
    assert alive < 1e-3
    assert abs(float(lam.mean()) - MEAN) < 0.01 and float(lam.std()) < 0.01


def test_live_init_spreads_around_the_same_mean() -> None:
    module = mlp("live")
    with torch.no_grad():
        alive = (module.fc1(rows()) > 0).float().mean()
        score = module.fc2(F.relu(module.fc1(rows())))
        lam = module(rows())
    assert 0.4 < alive < 0.6
    assert abs(float(score.mean()) + 2.5) < 0.1
    assert abs(float(lam.mean()) - MEAN) < 0.2 and float(lam.std()) > 0.2


@pytest.mark.parametrize("init", ["live", "authors"])
def test_initialization_uses_only_the_given_generator(init: str) -> None:
    torch.manual_seed(1)
    first, global_state = mlp(init), torch.get_rng_state()
    torch.manual_seed(2)
    again, other = mlp(init), mlp(init, seed=5)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert a.equal(b)
    assert not first.fc1.weight.equal(other.fc1.weight)
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(global_state)  # construction does not advance the global generator


def test_router_weight_is_kaiming_uniform() -> None:
    router = SparsegenRouter(D, 50)
    router.reset(generator())
    bound = D**-0.5
    weight = router.weight.detach()
    assert 0.99 * bound < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.03) and abs(float(weight.mean())) < 0.05 * bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_gives_float32_scores(dtype: torch.dtype) -> None:
    router, module = SparsegenRouter(D, E), mlp("live")
    router.reset(generator())
    x = rows().to(dtype).requires_grad_()
    logits, lam = router(x), module(x)
    assert logits.dtype == lam.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ router.weight.t())  # not rounded to half precision
    torch.testing.assert_close(lam, module(x.float()), rtol=0.05, atol=0.05)
    routing = router.weigh(logits, lam, router.decide(logits, lam))
    (routing.p_TE * torch.randn(T, E)).sum().backward()
    gradients = [x.grad, router.weight.grad, *(p.grad for p in module.parameters())]
    assert [g.dtype for g in gradients] == [dtype] + [torch.float32] * 5
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    assert router(x.double()).dtype == torch.float64


def test_decide_then_weigh_equals_sparsegen() -> None:
    router = SparsegenRouter(D, E)
    router.reset(generator())
    x, lam = rows(), torch.rand(T) * 2 - 1.5
    logits = router(x)
    routing = router.weigh(logits, lam, router.decide(logits, lam))
    expected = sparsegen(x @ router.weight.t(), lam)
    torch.testing.assert_close(routing.p_TE, expected)
    assert torch.equal(routing.p_TE != 0, expected != 0)
    assert routing.logits_TE is logits and routing.lam_T is lam


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_linear(bias: bool) -> None:
    x, weight, b = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, 4), (3, 4), (3,)))
    assert torch.autograd.gradcheck(
        lambda *a: linear(a[0], a[1], a[2] if bias else None, torch.float64), (x, weight, b)
    )
    torch.testing.assert_close(linear(x, weight, b, torch.float64), F.linear(x, weight, b))


def test_linear_without_a_gradient_for_its_input() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(5, 4)
    linear(x, weight, None, torch.float32).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_linear_saves_no_cast_copies(dtype: torch.dtype) -> None:
    layer = InputDtypeLinear(D, H)
    x = rows().to(dtype).requires_grad_()
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
        linear(x, layer.weight, None, torch.float64)  # a product in a wider dtype saves no cast copy of x
    assert kept == [x.data_ptr(), layer.weight.data_ptr()] * 2
    assert y.dtype == dtype
