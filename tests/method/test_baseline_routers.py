"""Baseline routers: weights, supports and gradients against formulas evaluated token by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldmole_dist.method.context import LossWeights, StepContext
from ldmole_dist.method.losses import entropy_loss, l1_loss, next_l1_coefficient
from ldmole_dist.method.names import ROUTER_NAMES
from ldmole_dist.method.routers import ROUTERS, Router, new_router

D, E, T = 6, 5, 40
TOP_K, TOP_P = 2, 0.6


def router(name: str, experts: int = E) -> Router:
    made = new_router(name, D, experts, top_k=TOP_K, top_p=TOP_P).double()
    made.reset(torch.Generator().manual_seed(0))
    return made


def scores(seed: int = 1) -> Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def softmax(u: list[float]) -> list[float]:
    powers = [math.exp(value - max(u)) for value in u]
    return [power / sum(powers) for power in powers]


def top_k(u: list[float]) -> list[float]:
    chosen = sorted(range(E), key=lambda e: -u[e])[:TOP_K]
    weights = iter(softmax([u[e] for e in chosen]))
    p = dict(zip(chosen, weights, strict=True))
    return [p.get(e, 0.0) for e in range(E)]


def top_p(u: list[float]) -> list[float]:
    p, mass = softmax(u), 0.0
    kept = [0.0] * E
    for e in sorted(range(E), key=lambda e: -u[e]):
        kept[e] = p[e]
        mass += p[e]
        if mass >= TOP_P:
            break
    return kept


REFERENCES: dict[str, Callable[[list[float]], list[float]]] = {
    "softmax": softmax,
    "topk": top_k,
    "top_p": top_p,
    "relu": lambda u: [max(value, 0.0) for value in u],
    "lora": lambda u: [1.0] * E,
}


def routed(name: str, u_TE: Tensor) -> Tensor:
    made = router(name, u_TE.shape[1])
    return made.weigh(u_TE, None, made.decide(u_TE, None)).p_TE


@pytest.mark.parametrize("name", REFERENCES)
def test_weights(name: str) -> None:
    expected = torch.tensor([REFERENCES[name](u) for u in scores().tolist()], dtype=torch.float64)
    torch.testing.assert_close(routed(name, scores()), expected)


@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"lora"}))
def test_gradients(name: str) -> None:
    assert torch.autograd.gradcheck(lambda u: routed(name, u), scores()[:6].requires_grad_())


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(
    "u_TE",
    [
        torch.tensor([[200.0, -200.0, 0.0], [-200.0, -200.0, -200.0]]),
        torch.zeros(3, E),
        torch.randn(4, 1, generator=torch.Generator().manual_seed(2)),
        torch.zeros(0, E),
        torch.tensor([[1e-40, -1e-40, 1.0]]),
    ],
    ids=["extreme", "equal", "one expert", "no token", "subnormal"],
)
def test_nonzero_weights_are_the_support(name: str, u_TE: Tensor) -> None:
    """The dispatch decides from the support and runs from the weights, so they must agree."""
    if u_TE.shape[1] < TOP_K and name == "topk":
        pytest.skip("more experts are asked for than there are: the config refuses it")
    made = router(name, u_TE.shape[1])
    support = made.decide(u_TE, None)
    p_TE = made.weigh(u_TE, None, support).p_TE
    assert torch.equal(p_TE != 0, support) and bool(p_TE.isfinite().all())
    if name == "relu":
        assert torch.equal(support, u_TE > 0)
    if name == "topk":
        assert bool((support.sum(-1) == TOP_K).all())


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-200.0, -1.5, -1e-30, 0.0, 0.3, 1.0, 200.0]), min_size=E, max_size=E), max_size=6
    ),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_support_and_weights_agree_for_extreme_scores(name: str, rows: list[list[float]], dtype: torch.dtype) -> None:
    """Ties, underflow and rows without a positive score."""
    u_TE = torch.tensor(rows, dtype=dtype).view(-1, E).requires_grad_()
    made = router(name)
    support = made.decide(u_TE, None)
    routing = made.weigh(u_TE, None, support)
    assert torch.equal(routing.p_TE != 0, support)
    if name != "lora":
        routing.p_TE.sum().backward()
        assert u_TE.grad is not None and bool(u_TE.grad.isfinite().all())
    prob_TE = u_TE.detach().softmax(-1)
    if name == "topk":
        assert bool((support.sum(-1) == TOP_K).all())
        torch.testing.assert_close(routing.p_TE.sum(-1).detach(), torch.ones(len(rows), dtype=dtype))
    if name == "top_p":
        mass = (prob_TE * support).sum(-1)
        least = prob_TE.masked_fill(~support, 2).amin(-1)
        assert bool((mass >= TOP_P - 1e-6).all()) and bool((mass - least < TOP_P + 1e-6).all())
    if name in ("topk", "top_p"):  # no inactive expert has a higher score than an active one
        order_TE = u_TE.detach() if name == "topk" else prob_TE
        inside, outside = order_TE.masked_fill(~support, 300), order_TE.masked_fill(support, -300)
        assert bool((inside.amin(-1) >= outside.amax(-1)).all())


@pytest.mark.parametrize("name", sorted(set(REFERENCES) - {"lora"}))
def test_nan_scores_reach_the_output(name: str) -> None:
    u_TE = scores()
    u_TE[3, 1] = torch.nan
    assert bool(routed(name, u_TE)[3].isnan().any()) and bool(routed(name, u_TE)[:3].isfinite().all())


@pytest.mark.parametrize("name", ROUTERS)
def test_scores_are_at_least_float32(name: str) -> None:
    x_TD = torch.randn(T, D).bfloat16()
    assert router(name).float()(x_TD).dtype == torch.float32


@pytest.mark.parametrize("name", ["softmax", "topk", "top_p"])
def test_balance_loss_uses_support_and_probabilities_before_selection(name: str) -> None:
    u_TE, mask = scores().requires_grad_(), torch.arange(T) % 3 != 0
    made = router(name)
    of_group = made.weigh(u_TE.unsqueeze(0), None, made.decide(u_TE.unsqueeze(0), None))
    (routing,), context = of_group.by_linear(), StepContext()
    context.weights = LossWeights(balance=1.0)
    context.begin(mask.view(1, T))
    context.record_routing(["linear"], of_group, context.token_mask("attention_mask", torch.Size((1, T))), made.losses)
    rows = u_TE[mask].tolist()
    active = [[weight > 0 for weight in REFERENCES[name](u)] for u in rows]
    freq = [sum(token[e] for token in active) / sum(map(sum, active)) for e in range(E)]
    prop = [sum(softmax(u)[e] for u in rows) / len(rows) for e in range(E)]
    loss = context.auxiliary_loss()
    assert float(loss.detach()) == pytest.approx(E * sum(f * p for f, p in zip(freq, prop, strict=True)))
    if name == "softmax":  # all experts are active, so the loss is constant
        assert float(loss.detach()) == pytest.approx(1)
    else:
        (gradient,) = torch.autograd.grad(loss, u_TE)
        assert (gradient[mask][routing.p_TE[mask] == 0] != 0).all()  # inactive experts get a gradient too
        assert not gradient[~mask].any()


@pytest.mark.parametrize("name", ["topk", "top_p"])
def test_ties_go_to_the_lower_index(name: str) -> None:
    """torch.topk does not specify the order of ties, so the decision could depend on the device."""
    for experts in (3, 64, 3000):
        made = new_router(name, D, experts, top_k=2, top_p=1.5 / experts)
        assert made.decide(torch.zeros(5, experts), None)[:, :2].all()
        assert int(made.decide(torch.zeros(5, experts), None).sum()) == 10


def test_l1_loss() -> None:
    p_TE = routed("relu", scores()).detach().requires_grad_()
    mask = torch.arange(T) % 3 != 0
    p, active = p_TE[mask], (p_TE[mask] != 0).double()
    f_E = E / (TOP_K * len(p)) * active.sum(0)
    expected = sum(f_E[e] * p[:, e].sum() / len(p) for e in range(E))
    loss = l1_loss(p_TE, TOP_K, mask)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, p_TE)
    torch.testing.assert_close(gradient, mask.unsqueeze(1) * f_E / len(p))
    assert float(l1_loss(p_TE, TOP_K, torch.zeros(T, dtype=torch.bool)).detach()) == 0


def test_l1_coefficient_adapts() -> None:
    assert next_l1_coefficient(0.5, 3.0, 2, 1.2) == pytest.approx(0.6)
    assert next_l1_coefficient(0.6, 1.9, 2, 1.2) == pytest.approx(0.5)
    assert next_l1_coefficient(0.5, 2.0, 2, 1.2) == 0.5


def test_entropy_loss() -> None:
    mask = torch.arange(T) % 4 != 0
    entropies = [-sum(p * math.log(p) for p in softmax(u)) for u in scores()[mask].tolist()]
    assert float(entropy_loss(scores(), mask)) == pytest.approx(sum(entropies) / len(entropies))
    flat, sharp = torch.zeros(1, E), torch.tensor([[500.0] + [0.0] * (E - 1)])
    assert float(entropy_loss(flat)) == pytest.approx(math.log(E)) and float(entropy_loss(sharp)) == 0
    assert float(entropy_loss(scores(), torch.zeros(T, dtype=torch.bool))) == 0


def test_router_names_are_the_keys_of_routers() -> None:
    assert tuple(ROUTERS) == ROUTER_NAMES
