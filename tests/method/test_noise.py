"""Noise on router scores: off by default, determined by its key, repeated by a recomputation."""

import pytest
import torch
from torch import Tensor

from ldmole_dist.method.context import StepContext
from ldmole_dist.method.noise import RouterNoise, linear_decay
from ldmole_dist.method.statistics import RoutingSums
from tests.method.test_context import MASK, forward_and_backward, hidden, make_layers, one_region, plain, two_regions

NOISE = RouterNoise(std=2.0, key=(0, 3, 1, 0))


def noisy(run):  # type: ignore[no-untyped-def]
    def with_noise(layers: list, context: StepContext, x: Tensor) -> Tensor:
        context.noise = NOISE
        return run(layers, context, x)

    return with_noise


@pytest.mark.parametrize("run", [one_region, two_regions])
def test_recomputation_draws_same_noise(run) -> None:  # type: ignore[no-untyped-def]
    kept, recomputed = forward_and_backward(noisy(plain)), forward_and_backward(noisy(run))
    quiet = forward_and_backward(plain)
    assert all(kept[name].equal(recomputed[name]) for name in kept)
    assert any(not torch.allclose(kept[name], quiet[name]) for name in kept)


def test_noise_depends_only_on_key_and_name() -> None:
    u_TE = torch.zeros(1000, 4)
    drawn = NOISE.add_to(u_TE, "q_proj")
    assert drawn.equal(NOISE.add_to(u_TE, "q_proj"))
    assert abs(float(drawn.std()) - 2.0) < 0.1 and abs(float(drawn.mean())) < 0.2
    others = [NOISE.add_to(u_TE, "k_proj"), *(NOISE._replace(key=key).add_to(u_TE, "q_proj") for key in KEYS)]
    assert all(float((drawn - other).abs().mean()) > 1 for other in others)


KEYS = [(1, 3, 1, 0), (0, 4, 1, 0), (0, 3, 2, 0), (0, 3, 1, 1)]


def test_no_noise_in_evaluation() -> None:
    layers, context = make_layers()
    found = []
    for layer in layers:
        layer.eval()
    for context.noise in (None, NOISE):
        context.observer = RoutingSums()
        context.begin(MASK)
        plain(layers, context, hidden())
        found.append(context.observer.by_linear)
    assert all(found[0][name].equal(found[1][name]) for name in found[0])


def test_noise_carries_no_gradient() -> None:
    u_TE = torch.zeros(5, 4, requires_grad=True)
    (NOISE.add_to(u_TE, "q_proj") * torch.arange(4)).sum().backward()
    assert u_TE.grad is not None and u_TE.grad.equal(torch.arange(4.0).expand(5, 4))


def test_std_decays_linearly_to_zero() -> None:
    found = [linear_decay(0.8, 0.5, step, 8) for step in range(1, 9)]
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0])
