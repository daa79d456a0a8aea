"""Routing statistics: sums over micro-batches without padding, and the observer that accumulates them."""

import math

import pytest
import torch
from torch import Tensor

from ldmole_dist.method.routers import Routing
from ldmole_dist.method.statistics import RoutingSums, routing_sums, summarize
from tests.method.test_context import MASK, B, S, forward_and_backward, hidden, make_layers, one_region, plain


def routing(p: list[list[float]], lam: list[float]) -> Routing:
    p_TE = torch.tensor(p)
    return Routing(p_TE, torch.zeros_like(p_TE), torch.tensor(lam))


THREE = routing([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]], [0.5, -1.0, -4.0])


def test_summary_by_hand() -> None:
    found = summarize(routing_sums(THREE))
    assert found["tokens"] == 3 and found["dead_experts"] == 1
    assert found["lambda_mean"] == pytest.approx(-1.5) and found["lambda_std"] == pytest.approx(math.sqrt(3.5))
    assert found["experts_per_token"] == pytest.approx(2.0)
    assert found["histogram"] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])
    assert found["load"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0]) and found["max_load"] == pytest.approx(2.0)
    assert found["weight"] == pytest.approx([1.75 / 3, 0.75 / 3, 0.5 / 3, 0])
    assert found["entropy"] == pytest.approx((0 + math.log(2) + 1.5 * math.log(2)) / 3 / math.log(4))


def test_sums_add_over_micro_batches() -> None:
    parts = [Routing(*(t[part] for t in THREE[:3])) for part in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(routing_sums(part) for part in parts), routing_sums(THREE))


def test_padding_is_masked_even_if_nan() -> None:
    broken = Routing(*(torch.cat([t, torch.full_like(t[:1], torch.nan)]) for t in THREE[:3]))
    mask_T = torch.tensor([True, True, True, False])
    assert routing_sums(broken, mask_T).equal(routing_sums(THREE))
    assert summarize(routing_sums(THREE, torch.zeros(3, dtype=torch.bool)))["dead_experts"] == 4


def test_tokens_without_experts_are_counted() -> None:
    found = summarize(routing_sums(routing([[0.0, 0.0], [0.0, 2.0]], [0.0, 0.0])))
    assert found["histogram"] == [0.5, 0.5, 0.0] and found["weight"] == [0.0, 1.0]


def observed(layers_and_context: tuple, x: Tensor) -> dict[str, Tensor]:
    layers, context = layers_and_context
    context.observer = RoutingSums()
    context.begin(MASK)
    plain(layers, context, x)
    context.end()
    return context.observer.by_linear


def test_observer_is_called_for_every_linear_in_training_and_evaluation() -> None:
    made = make_layers()
    in_training = observed(made, hidden())
    for layer in made[0]:
        layer.eval()
    in_evaluation = observed(made, hidden())
    assert set(in_training) == {"linear0", "linear1"}
    assert all(in_training[name].equal(in_evaluation[name]) for name in in_training)
    assert summarize(in_training["linear0"])["tokens"] == int(MASK.sum()) < B * S


def test_recomputation_does_not_call_observer() -> None:
    sums = RoutingSums()

    def run(layers: list, context: object, x: Tensor) -> Tensor:
        context.observer = sums
        return one_region(layers, context, x)

    forward_and_backward(run)
    assert summarize(sums.by_linear["linear1"])["tokens"] == int(MASK.sum())
