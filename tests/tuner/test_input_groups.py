"""Input groups: found by tracing the model, computed in one dispatch, with the results of separate linears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from ldmole_dist.method.context import LossWeights, StepContext
from ldmole_dist.method.experts import ExpertBank
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.layer import Finish, InputGroup, LocalDispatch, MoELinear
from ldmole_dist.method.routers import SparsegenRouter
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.selftest.tiny import SIZES, adapted, micro_batch, tiny_backbone
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.input_groups import find_input_groups
from ldmole_dist.tuner.model import tuner_of

ENCODER: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
B, S, D, E, R = 2, 5, 6, 4, 2
OUTS = (6, 3, 4)


class CountingDispatch(LocalDispatch):
    """Local dispatch that records the number of linears of each call."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def start(self, x_TD: Tensor, routings: Sequence[Any], banks: Any, plan: Any, repeated: bool = False) -> Finish:
        self.sizes.append(len(routings))
        return super().start(x_TD, routings, banks, plan, repeated)


def make_linears(grouped: bool, dropout: float = 0.0) -> tuple[list[MoELinear], StepContext, CountingDispatch]:
    """Return three float64 linears for one input, with the same values at every call."""
    draw = torch.Generator().manual_seed(0)
    context, dispatch = StepContext(), CountingDispatch()
    context.weights = LossWeights(0.7, 0.3, 0.05)
    lambda_mlp = LambdaMLP(D, 8, 0.01).double()
    lambda_mlp.reset(draw, "live")
    linears = []
    for i, O in enumerate(OUTS):
        linear = MoELinear(nn.Linear(D, O).double().requires_grad_(False), f"linear{i}", context, dispatch)
        router = SparsegenRouter(D, E).double()
        A, B_ = (torch.randn(E, *shape, generator=draw, dtype=torch.float64) for shape in ((R, D), (O, R)))
        with torch.no_grad():
            router.weight.copy_(torch.randn(E, D, generator=draw))
            for parameter in linear.base_layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        linear.add_adapter("default", ExpertBank(nn.Parameter(A), nn.Parameter(B_), 2.0), router, lambda_mlp, dropout)
        linears.append(linear)
    if grouped:
        group = InputGroup(linears, "default")
        for linear in linears:
            linear.groups["default"] = group
    return linears, context, dispatch


def hidden(seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, S, D, generator=draw, dtype=torch.float64).requires_grad_()


def read(linears: list[MoELinear], x: Tensor) -> Tensor:
    # A view for each linear, like those that ZeRO-3's hooks pass: the same memory, but not the same object.
    return torch.cat([linear.forward_with_adapter(x.view_as(x), "default") for linear in linears], dim=-1)


def results(
    grouped: bool, run: Callable[..., Tensor] = read, decide: Callable[[int], Any] | None = None
) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """Return outputs, gradients (with auxiliary losses) and the number of linears of each dispatch."""
    linears, context, dispatch = make_linears(grouped)
    if decide is not None:
        for i, linear in enumerate(linears):
            linear.ldmole_adapters["default"].router.decide = decide(i)
    x = hidden()
    context.begin(None)
    y = run(linears, x)
    context.end()
    assert len(context.stats) == len(OUTS)
    (y.square().sum() + context.auxiliary_loss()).backward()
    gradients = {f"{i}.{n}": p.grad for i, linear in enumerate(linears) for n, p in linear.named_parameters()}
    gradients |= {n: p.grad for n, p in linears[0].lambda_mlps["default"].named_parameters()}
    return y, {"x": x.grad} | {n: g for n, g in gradients.items() if g is not None}, dispatch.sizes


def random_support(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def decide(logits_TE: Tensor, lam_T: Tensor) -> Tensor:
        support = torch.rand(logits_TE.shape, generator=draw) < 0.5
        support[..., 0] |= ~support.any(-1)
        return support

    return decide


def test_group_equals_separate_linears_in_one_dispatch() -> None:
    (y, gradients, sizes), (y_alone, gradients_alone, sizes_alone) = results(True), results(False)
    assert sizes == [3] and sizes_alone == [1, 1, 1]
    torch.testing.assert_close(y, y_alone, rtol=1e-12, atol=1e-12)
    assert set(gradients) == set(gradients_alone) and len(gradients) == 1 + 3 * 3 + 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_alone[name], rtol=1e-12, atol=1e-12)


def test_checkpointed_group_replays_its_routing() -> None:
    linears, context, _ = make_linears(True)

    def checkpointed(linears: list[MoELinear], x: Tensor) -> Tensor:
        contexts = linears[0].context.checkpoint_contexts
        return checkpoint(read, linears, x, use_reentrant=False, context_fn=contexts)

    y, expected, _ = results(True, decide=random_support)
    y_again, found, sizes = results(True, checkpointed, random_support)
    assert y.equal(y_again) and sizes == [3, 3]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def test_group_shares_one_dropout_mask() -> None:
    linears, _, _ = make_linears(True, dropout=0.5)
    x = hidden()
    torch.manual_seed(0)
    y = read(linears, x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    plain, _, _ = make_linears(False)
    expected = read(plain, dropped)
    base = [torch.cat([linear.base_layer(t) for linear in linears], dim=-1) for t in (x, dropped)]
    torch.testing.assert_close(y - base[0], expected - base[1])


def test_member_with_another_input_is_computed_separately() -> None:
    linears, _, dispatch = make_linears(True)
    alone, _, _ = make_linears(False)
    x, other = hidden(), hidden(seed=2)
    torch.testing.assert_close(
        linears[0].forward_with_adapter(x, "default"), alone[0].forward_with_adapter(x, "default")
    )
    torch.testing.assert_close(
        linears[1].forward_with_adapter(other, "default"), alone[1].forward_with_adapter(other, "default")
    )
    torch.testing.assert_close(
        linears[2].forward_with_adapter(x, "default"), alone[2].forward_with_adapter(x, "default")
    )
    assert dispatch.sizes[:2] == [3, 1]
    # The result that was prepared for it must not be used in the next forward.
    torch.testing.assert_close(read(linears, other), read(alone, other))


def test_member_is_computed_separately_after_a_change_of_the_input_in_place() -> None:
    linears, _, dispatch = make_linears(True)
    alone, _, _ = make_linears(False)
    x = hidden().detach()
    linears[0].forward_with_adapter(x, "default")
    x.mul_(2)
    torch.testing.assert_close(
        linears[1].forward_with_adapter(x, "default"), alone[1].forward_with_adapter(x, "default")
    )
    assert dispatch.sizes == [3, 1]


def test_member_with_a_slice_of_the_input_is_computed_separately() -> None:
    linears, _, _ = make_linears(True)
    alone, _, _ = make_linears(False)
    x = hidden()
    linears[0].forward_with_adapter(x, "default")
    first = x[:, :1]  # has the same data pointer
    torch.testing.assert_close(
        linears[1].forward_with_adapter(first, "default"), alone[1].forward_with_adapter(first, "default")
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_groups_of_a_decoder(architecture: str) -> None:
    model = tiny_backbone(architecture, torch.float32, torch.device("cpu"))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = find_input_groups(model, names)
    groups = [group.linears for group in found]
    assert {mask_name for group in found for mask_name in group.mask_names} == {"attention_mask"}
    assert torch.get_rng_state().equal(state)
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert [f"{attention}.{n}_proj" for n in "qkv"] in groups and [f"{attention}.o_proj"] in groups
        assert [f"{mlp}.gate_proj", f"{mlp}.up_proj"] in groups and [f"{mlp}.down_proj"] in groups
    assert len(groups) == 8
    some = [f"model.layers.0.self_attn.{n}_proj" for n in "kv"]
    assert find_input_groups(model, some) == [(some, ["attention_mask"] * 2)]


def test_model_without_meta_forward_gets_groups_of_one() -> None:
    names = ["0", "1"]
    assert find_input_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), names) == [
        (["0"], [None]),
        (["1"], [None]),
    ]


@pytest.mark.full
def test_compiles_to_one_graph() -> None:
    model = adapted(tiny_backbone("llama", torch.float32, torch.device("cpu")), ExpertParallel())
    batch = micro_batch(0, torch.device("cpu"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


def bart() -> BartForConditionalGeneration:
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, max_position_embeddings=32, **sizes))


def test_group_does_not_span_layers() -> None:
    # All cross-attentions read the output of the encoder, and gradient checkpointing recomputes each decoder layer by itself.
    model = get_peft_model(
        bart(), LdMoleConfig(target_modules="all-linear", num_experts=2, r=2, lora_dropout=0.0)
    ).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    group = tuner_of(model).model.get_submodule("model.decoder.layers.1.encoder_attn.v_proj").groups["default"]
    assert [linear.name.rsplit(".", 1)[-1] for linear in group.linears] == ["k_proj", "v_proj"]
    ids = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    model.config.dropout = 0.0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_groups_of_routed_experts_and_of_another_modality() -> None:
    sizes: dict[str, Any] = SIZES | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).bfloat16()
    vit = ViTModel(ViTConfig(**ENCODER, image_size=8, patch_size=4))
    for model, mask_name in ((moe, "attention_mask"), (vit, None)):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        groups = find_input_groups(model, names)
        assert all(group.linears[0].endswith("q_proj") for group in groups if len(group.linears) == 3)
        assert {len(group.linears) for group in groups} == {1, 3}
        assert {name for group in groups for name in group.mask_names} == {mask_name}
    assert moe.config._experts_implementation != "batched_mm"


def test_linears_whose_tokens_are_not_certain_have_no_mask() -> None:
    # Its query and key projections also read position embeddings.
    deberta = DebertaV2Model(
        DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True)
    )
    # Its routing does not run on the meta device, so that its decoder is traced by itself.
    switch = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            num_experts=2,
            num_sparse_encoder_layers=1,
        )
    )
    for model, certain in ((deberta, ["value_proj", "dense"]), (switch, [])):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        found = {
            name: mask_name
            for group in find_input_groups(model, names)
            for name, mask_name in zip(*group, strict=True)
            if name.startswith("encoder" if model is deberta else "decoder")
        }
        assert found and set(found.values()) <= {"attention_mask", None}
        assert {name.rsplit(".", 1)[-1] for name, mask_name in found.items() if mask_name} == set(certain)


def test_untraced_linears_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    find_input_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0", "1"])
    (record,) = caplog.records
    assert "2 of 2 linears, such as 0, could not be traced (Sequential is not a PreTrainedModel" in record.message
