"""MoELinear and StepContext: masks, auxiliary losses, and decisions that a recomputation replays."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from ldmole_dist.method.context import LossWeights, StepContext
from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.layer import LocalDispatch, MoELinear
from ldmole_dist.method.losses import load_balance_loss, router_z_loss, sparsity_loss
from ldmole_dist.method.routers import SparsegenRouter

B, S, D, E, R = 2, 5, 6, 4, 2
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
WEIGHTS = LossWeights(balance=0.7, sparsity=0.3, z=0.05, target_k=2)


class Layer(MoELinear):
    """MoELinear with its only adapter active, as in the PEFT tuner."""

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_adapter(x, "default")


def make_layers(count: int = 2) -> tuple[list[Layer], StepContext]:
    """Return layers D -> D in float64 that share one context and one lambda-MLP, with the same values at every call."""
    draw = torch.Generator().manual_seed(0)
    context = StepContext()
    context.weights = WEIGHTS
    lambda_mlp = LambdaMLP(D, 8, 0.01).double()
    lambda_mlp.reset(draw, "live")
    layers = []
    for i in range(count):
        layer = Layer(nn.Linear(D, D).double().requires_grad_(False), f"linear{i}", context, LocalDispatch())
        router = SparsegenRouter(D, E).double()
        A, B_ = (torch.randn(E, *shape, generator=draw, dtype=torch.float64) for shape in ((R, D), (D, R)))
        with torch.no_grad():
            router.weight.copy_(torch.randn(E, D, generator=draw))
            for parameter in layer.base_layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        layer.add_adapter("default", ExpertBank(nn.Parameter(A), nn.Parameter(B_), 2.0), router, lambda_mlp, 0.0)
        layers.append(layer)
    return layers, context


def hidden(*shape: int) -> Tensor:
    x = torch.randn(*(shape or (B, S)), D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def gradients(layers: list[Layer], x: Tensor) -> dict[str, Tensor]:
    found = {f"{i}.{name}": p.grad for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
    found |= {f"lambda.{name}": p.grad for name, p in layers[0].lambda_mlps["default"].named_parameters()}
    return {"x": x.grad} | {name: grad for name, grad in found.items() if "base_layer" not in name}


def forward_and_backward(
    run: Callable[[list[Layer], StepContext, Tensor], Tensor], prepare: Callable[[Layer, int], None] = lambda *_: None
) -> dict[str, Tensor]:
    """Return all gradients of one micro-batch, including those of the auxiliary losses."""
    layers, context = make_layers()
    for i, layer in enumerate(layers):
        prepare(layer, i)
    x = hidden()
    context.begin(MASK)
    y = run(layers, context, x)
    context.end()
    (y.square().sum() + context.auxiliary_loss()).backward()
    found = gradients(layers, x)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found.values())
    return found


def plain(layers: list[Layer], context: StepContext, x: Tensor) -> Tensor:
    return layers[1](layers[0](x).tanh())


def one_region(layers: list[Layer], context: StepContext, x: Tensor) -> Tensor:
    return checkpoint(plain, layers, context, x, use_reentrant=False, context_fn=context.checkpoint_contexts)


def two_regions(layers: list[Layer], context: StepContext, x: Tensor) -> Tensor:
    for layer, after in zip(layers, (torch.tanh, lambda y: y), strict=True):
        x = checkpoint(
            lambda x, layer=layer, after=after: after(layer(x)),
            x,
            use_reentrant=False,
            context_fn=context.checkpoint_contexts,
        )
    return x


def without_a_tape(layers: list[Layer], context: StepContext, x: Tensor) -> Tensor:
    return checkpoint(plain, layers, context, x, use_reentrant=False)


def twice(layers: list[Layer], context: StepContext, x: Tensor) -> Tensor:
    return plain(layers, context, plain(layers, context, x).tanh())


def twice_in_a_region(layers: list[Layer], context: StepContext, x: Tensor) -> Tensor:
    return checkpoint(twice, layers, context, x, use_reentrant=False, context_fn=context.checkpoint_contexts)


def decide_differently_each_time(layer: Layer, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def decide(logits_TE: Tensor, lam_T: Tensor) -> Tensor:
        support = torch.rand(logits_TE.shape, generator=draw) < 0.5
        support[..., 0] |= ~support.any(-1)
        return support

    layer.ldmole_adapters["default"].router.decide = decide


def test_padding_is_masked_in_losses_and_statistics() -> None:
    (layer, _), context = make_layers()
    x = hidden()
    real = MASK.flatten().bool()
    context.begin(MASK)
    layer(x)
    router, x_TD = layer.ldmole_adapters["default"].router, x.flatten(0, 1)[real]
    logits, lam = router(x_TD), layer.lambda_mlps["default"](x_TD)
    p = router.weigh(logits, lam, router.decide(logits, lam)).p_TE
    expected = {
        "balance": load_balance_loss(p),
        "sparsity": sparsity_loss(logits, lam, 2),
        "z": router_z_loss(logits),
    }
    for name, value in expected.items():
        torch.testing.assert_close(context.mean(name), value)
        assert float(value.detach()) > 0
    tokens = torch.tensor(len(p)).double()
    torch.testing.assert_close(context.stats["linear0"], torch.stack([(p > 0).sum().double(), lam.sum(), tokens]))
    context.begin(None)
    layer(x)
    assert not torch.isclose(context.mean("sparsity"), expected["sparsity"])


def test_auxiliary_loss_is_the_weighted_mean_over_linears() -> None:
    layers, context = make_layers()
    assert context.auxiliary_loss() == 0.0
    context.begin(MASK)
    plain(layers, context, hidden())
    assert [len(values) for values in context.terms.values()] == [2, 2, 2] and set(context.stats) == {
        "linear0",
        "linear1",
    }
    mean = {name: (values[0] + values[1]) / 2 for name, values in context.terms.items()}
    torch.testing.assert_close(
        context.auxiliary_loss(), 0.7 * mean["balance"] + 0.3 * mean["sparsity"] + 0.05 * mean["z"]
    )
    context.begin(MASK)  # clears the records of the previous micro-batch
    assert context.auxiliary_loss() == 0.0 and context.stats == {}


@pytest.mark.parametrize("run", [one_region, two_regions, without_a_tape])
def test_gradients_equal_with_and_without_checkpointing(run: Callable[..., Tensor]) -> None:
    expected, found = forward_and_backward(plain), forward_and_backward(run)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", [one_region, two_regions])
def test_recomputation_replays_decision(run: Callable[..., Tensor]) -> None:
    expected = forward_and_backward(plain, decide_differently_each_time)
    found = forward_and_backward(run, decide_differently_each_time)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-12)


def test_gradients_differ_without_replay() -> None:
    expected = forward_and_backward(plain, decide_differently_each_time)
    try:
        found = forward_and_backward(without_a_tape, decide_differently_each_time)
    except CheckpointError:
        return
    assert not torch.allclose(found["0.ldmole_adapters.default.lora_A"], expected["0.ldmole_adapters.default.lora_A"])


def test_layer_called_twice_replays_decisions_in_order() -> None:
    expected = forward_and_backward(twice, decide_differently_each_time)
    found = forward_and_backward(twice_in_a_region, decide_differently_each_time)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-12)


def test_second_backward_replays_again() -> None:
    layers, context = make_layers()
    for i, layer in enumerate(layers):
        decide_differently_each_time(layer, i)
    x = hidden()
    context.begin(MASK)
    y = one_region(layers, context, x)
    context.end()
    y.square().sum().backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in gradients(layers, x).items()}
    y.square().sum().backward()
    for name, grad in gradients(layers, x).items():
        torch.testing.assert_close(grad, 2 * once[name], rtol=1e-12, atol=1e-12)


def test_no_decision_is_replayed_after_the_region() -> None:
    layers, context = make_layers()
    context.begin(MASK)
    y = one_region(layers, context, hidden())
    context.end()
    y.sum().backward()
    other = hidden().detach().flip(0, 1)
    again, _ = make_layers()
    torch.testing.assert_close(plain(layers, context, other), plain(again, context, other))
    assert context.replay_decision(layers[0]) is None


def test_recomputation_records_nothing() -> None:
    layers, context = make_layers()
    context.begin(MASK)
    y = two_regions(layers, context, hidden())
    context.end()
    loss = y.sum() + context.auxiliary_loss()
    terms, stats = {name: list(values) for name, values in context.terms.items()}, dict(context.stats)
    loss.backward()
    assert all(len(values) == 2 for values in context.terms.values())
    assert context.terms == terms and context.stats == stats


def test_reentrant_checkpointing_is_refused() -> None:
    layers, context = make_layers()
    context.begin(MASK)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        checkpoint(plain, layers, context, hidden(), use_reentrant=True)


def test_reentrant_check_is_off_without_gradients() -> None:
    layers, context = make_layers()
    with torch.no_grad():
        context.begin(MASK)
        y = plain(layers, context, hidden())
        context.end()
    assert y.isfinite().all() and not y.requires_grad


def test_evaluation_records_nothing() -> None:
    layers, context = make_layers()
    for layer in layers:
        layer.eval()
    context.begin(MASK)
    plain(layers, context, hidden())
    assert context.stats == {} and context.auxiliary_loss() == 0.0


def test_forward_without_gradients_keeps_the_records() -> None:
    layers, context = make_layers()
    context.begin(MASK)
    plain(layers, context, hidden())
    context.end()
    terms, stats = {name: list(values) for name, values in context.terms.items()}, dict(context.stats)
    with torch.no_grad():
        context.begin(torch.ones(B, 1, S, S))  # as generation with a static cache passes it
        plain(layers, context, hidden().flip(0))
        context.end()
    assert stats and context.terms == terms and context.stats == stats


def test_mask_of_wrong_shape_is_refused_only_in_training() -> None:
    (layer, _), context = make_layers()
    context.begin(torch.ones(B, 1, S, S))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 5, 5\)"):
        layer(hidden())
    layer.eval()
    assert layer(hidden()).shape == (B, S, D)


def test_key_value_cache_uses_last_columns_of_mask() -> None:
    (layer, _), context = make_layers()
    x = hidden(B, 2)
    found = []
    for mask in (torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]]), torch.tensor([[1, 0], [1, 1]])):
        context.begin(mask)
        layer(x)
        found.append(context.stats["linear0"])
    assert found[0].equal(found[1])
    context.begin(torch.ones(B, 2))
    layer(x)
    assert not found[0].equal(context.stats["linear0"])


def test_any_leading_shape_including_no_tokens() -> None:
    (layer, _), context = make_layers()
    context.begin(None)
    x = hidden()
    expected = layer(x)
    torch.testing.assert_close(layer(x.flatten(0, 1)), expected.flatten(0, 1))
    torch.testing.assert_close(layer(x[1, 2]), expected[1, 2])
    assert layer(x[:, :0]).shape == (B, 0, D)


def test_router_lambda_and_experts_share_one_dropout_mask() -> None:
    (layer, _), _ = make_layers()
    x = hidden()
    layer.ldmole_adapters["default"].dropout = nn.Dropout(0.5)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    layer.eval()
    torch.testing.assert_close(y - layer.base_layer(x), layer(dropped) - layer.base_layer(dropped))
    assert not torch.allclose(y, layer(x))
