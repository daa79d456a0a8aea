"""LD-MoLE in the routed experts of MoE backbones, compared with a model whose base experts are computed one by one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ldmole_dist import LdMoleConfig, LossWeights, tuner_of
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.method.sparsegen import sparsegen
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.selftest.tiny import MOE_SIZES, MOE_TARGETS
from ldmole_dist.tuner.expert_targets import warn_if_experts_left_out
from ldmole_dist.tuner.experts import DOWN, GATE_UP, LdMoleExperts
from ldmole_dist.tuner.input_groups import NamedGroup
from ldmole_dist.tuner.model import spread_experts
from tests.small_adapter import adapt, move
from tests.small_run import make_config, make_folder, run_training
from tests.tuner.moe_backbones import FAMILIES, PARAMETERS, VOCABULARY, D, I, J, K, adapted, backbone

IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


class ReferenceExperts(nn.Module):
    """Routed experts with their adapter, by the formula: every base expert by itself, and every product written out."""

    def __init__(self, adapted: LdMoleExperts) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        base: Any = self.adapted.base_layer
        y_TD = torch.zeros_like(x_TD)
        for j in range(base.num_experts):
            token, place = torch.where(index_TK == j)
            h = base._apply_gate(self.projection("gate_up_proj", j, x_TD[token]))
            y = self.projection("down_proj", j, h) * weights_TK[token, place, None]
            y_TD = y_TD.index_add(0, token, y.to(y_TD.dtype))
        return y_TD

    def projection(self, name: str, j: int, x: Tensor) -> Tensor:
        base: Any = self.adapted.base_layer
        weight, bias = getattr(base, name)[j], getattr(base, f"{name}_bias")[j] if base.has_bias else None
        y = F.linear(x, weight.t() if base.is_transposed else weight, bias)
        layer = self.adapted.projections[name]
        adapter: Any = layer.ldmole_adapters["default"]
        lambda_mlp: Any = layer.lambda_mlps["default"]
        p = sparsegen(adapter.router(x), lambda_mlp(x))
        delta: Tensor = torch.einsum("te,eor,erd,td->to", p, adapter.lora_B, adapter.lora_A, x)
        return y + adapter.scaling * delta


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def gradients(model: Any, auxiliary: bool = False) -> dict[str, Tensor]:
    loss = model.train()(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    (loss + tuner_of(model).context.auxiliary_loss() if auxiliary else loss).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def use_reference(model: PeftModel) -> None:
    for parent in list(model.modules()):
        if isinstance(getattr(parent, "experts", None), LdMoleExperts):
            parent.experts = ReferenceExperts(parent.experts)  # type: ignore[assignment]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_base_experts_computed_one_by_one(family: str) -> None:
    bare, plain = backbone(family), {}
    for implementation in ("grouped_mm", "eager"):
        bare.set_experts_implementation(implementation)
        plain[implementation] = logits(bare)
    model = adapted(family)
    assert max(relative(logits(model), expected) for expected in plain.values()) < 1e-6  # B = 0
    moved, found = logits(move(model)), gradients(model)
    with model.disable_adapter():
        assert logits(model).equal(plain["grouped_mm"])
    assert relative(moved, plain["grouped_mm"]) > 1e-2
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    use_reference(model)
    assert relative(logits(model), moved) < 1e-6
    # Over all parameters together: single gradients of 1e-3 and less are sums of larger terms.
    values = {name.replace(".adapted", ""): value for name, value in gradients(model).items()}
    assert relative(*(torch.cat([g[name].flatten() for name in values]) for g in (found, values))) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_each_gradient_equals_the_reference_in_float64(family: str) -> None:
    model = move(adapted(family, torch.float64))
    found = gradients(model)
    use_reference(model)
    for name, expected in gradients(model).items():
        assert relative(found[name.replace(".adapted", "")], expected) < 1e-12, name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_checkpointing_changes_no_gradient(family: str) -> None:
    model = move(adapted(family, torch.float64))
    tuner_of(model).context.weights = LossWeights(balance=0.5, sparsity=0.2, z=0.1)
    found = gradients(model, auxiliary=True)
    model.gradient_checkpointing_enable()
    again = gradients(model, auxiliary=True)
    assert all(relative(again[name], value) < 1e-12 for name, value in found.items())


def test_padding_counts_in_no_loss_and_no_statistic() -> None:
    model = move(adapted("qwen3_moe", torch.float64)).train()
    context = tuner_of(model).context
    model(input_ids=IDS[:1, :5])
    terms, stats = context.terms, context.stats
    model(input_ids=IDS[:1], attention_mask=(torch.arange(9) < 5).long()[None])
    assert terms
    assert stats.keys() == context.stats.keys() and len(stats) == 3 * 2
    for name, expected in stats.items():
        assert torch.allclose(context.stats[name], expected, rtol=1e-12)
        assert expected[2] == (5 * K if name.endswith("down_proj") else 5)
    for term, values in terms.items():
        assert torch.allclose(torch.stack(context.terms[term]), torch.stack(values), rtol=1e-12)


def test_saved_adapter_loads_bit_equal(tmp_path: Path) -> None:
    model = move(adapted("gpt_oss", num_experts=[2, 4]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    assert {name: list(tensors[f"{prefix}.{name}"].shape) for name in EXPERT_TENSORS} == EXPERT_TENSORS
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(backbone("gpt_oss"), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert loaded.peft_config["default"].target_parameters == PARAMETERS
        assert logits(loaded).equal(logits(model))


EXPERT_TENSORS = {
    "0.mlp.experts.gate_up_proj.lora_A": [2, 2, D],
    "0.mlp.experts.gate_up_proj.lora_B": [2, 2 * I, 2],
    "1.mlp.experts.down_proj.lora_A": [4, 2, I],
    "1.mlp.experts.down_proj.lora_B": [4, D, 2],
    "1.mlp.experts.down_proj.router.weight": [4, I],
}


def loaded_logits(folder: str) -> Tensor:
    model = backbone("qwen3_moe")
    spread_experts(model, expert_parallel(2))
    return logits(PeftModel.from_pretrained(model, folder))


def test_saved_adapter_loads_on_two_ranks(tmp_path: Path, ranks2: LocalRanks) -> None:
    model = move(adapted("qwen3_moe"))
    model.save_pretrained(tmp_path)
    assert all(relative(found, logits(model)) < 1e-6 for found in ranks2.run(loaded_logits, str(tmp_path)))


def test_a_second_adapter_can_have_other_projections() -> None:
    model = move(adapted("qwen3_moe", target_parameters=PARAMETERS[1:]))
    first, plain = logits(model), logits(backbone("qwen3_moe"))
    model.add_adapter(
        "other", LdMoleConfig(num_experts=2, r=3, target_modules=["q_proj"], target_parameters=PARAMETERS)
    )
    model.set_adapter("other")
    assert logits(model).equal(plain)
    assert relative(logits(move(model)), plain) > 1e-2
    model.set_adapter("default")
    assert logits(model).equal(first)
    model.delete_adapter("other")
    assert logits(model).equal(first)
    assert logits(model.unload()).equal(plain)


def test_one_projection_layer_by_layer_choices_are_honored() -> None:
    only = adapted("qwen3_moe", target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"])
    assert [layer.name for layer in tuner_of(only).adapted_layers("default")] == [
        "model.layers.1.mlp.experts.down_proj"
    ]
    excluded = adapted("qwen3_moe", exclude_modules=[r"layers.0.mlp.experts.gate_up_proj"])
    assert sum(".experts." in n and ".lora_A" in n for n, _ in excluded.named_parameters()) == 3


def test_rank_pattern_applies_and_a_failed_injection_leaves_the_backbone_as_it_was() -> None:
    model = adapted("qwen3_moe", rank_pattern={"experts.down_proj": 3})
    ranks = {
        layer.name: layer.ldmole_adapters["default"].lora_A.shape[1]
        for layer in tuner_of(model).adapted_layers("default")
    }
    assert {3 if name.endswith("down_proj") else 2 for name in ranks} == set(ranks.values()) == {2, 3}
    bare = backbone("qwen3_moe")
    modules = [type(module) for module in bare.modules()]
    config = LdMoleConfig(target_modules=["o_proj"], target_parameters=PARAMETERS, rank_pattern={"nothing": 3})
    with pytest.raises(ValueError, match="matches no adapted linear"):
        get_peft_model(bare, config)
    assert [type(module) for module in bare.modules()] == modules


def test_every_row_counts_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    untraced = [NamedGroup([f"model.layers.{layer}.mlp.experts"], [None]) for layer in range(2)]
    monkeypatch.setattr("ldmole_dist.tuner.model.find_input_groups", lambda model, names: untraced)
    model = adapted("qwen3_moe").train()
    model(input_ids=IDS, attention_mask=MASK)
    stats = tuner_of(model).context.stats
    assert [int(stats[f"model.layers.0.mlp.experts.{name}"][2]) for name in (GATE_UP, DOWN)] == [18, 18 * K]


def test_cached_generation_equals_a_forward() -> None:
    model = move(adapted("qwen3_moe")).eval()
    cached, uncached = (
        model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert cached.equal(uncached)


def test_bfloat16_backbone_equals_grouped_mm_before_training() -> None:
    model = adapted("gpt_oss", torch.bfloat16)
    assert logits(model).equal(logits(backbone("gpt_oss", torch.bfloat16)))
    found = gradients(move(model))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target_parameters=["experts.up_proj"]), r"\['experts.up_proj'\] match no .* \['mlp.experts.down_proj', "),
        (dict(target_parameters=["q_proj.weight"]), "q_proj.weight: it is not a parameter of routed experts"),
        (dict(router_input="hidden"), "router_input='hidden' does not support target_parameters"),
    ],
)
def test_target_that_cannot_be_adapted_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapted("qwen3_moe", **changes)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("has_gate", False, "has no gate"),
        ("has_post_expert_norm", True, "has a norm after each expert"),
        ("has_bias", True, "has a layout that LD-MoLE is not tested with"),
        ("_is_expert_parallel", True, "is spread over ranks by transformers"),
        (
            "down_proj",
            nn.Parameter(torch.zeros(1, 1, 1).to(torch.int8), requires_grad=False),
            "has weights .* torch.int8",
        ),
    ],
)
def test_experts_of_an_untested_kind_are_refused(flag: str, value: Any, message: str) -> None:
    model = backbone("qwen3_moe")
    for layer in model.model.layers:
        setattr(layer.mlp.experts, flag, value)
    config = LdMoleConfig(target_modules=["o_proj"], target_parameters=PARAMETERS)
    with pytest.raises(ValueError, match=f"this Qwen3MoeExperts {message}.*% of the weights, are not adapted"):
        get_peft_model(model, config)


def test_experts_outside_the_interface_are_refused_or_reported(caplog: pytest.LogCaptureFixture) -> None:
    sizes = dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=J)
    model = Llama4ForCausalLM(
        Llama4TextConfig(vocab_size=VOCABULARY, hidden_size=D, intermediate_size=I, intermediate_size_mlp=I, **sizes)
    )
    reason = "this Llama4TextExperts does not use transformers' experts interface"
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, LdMoleConfig(target_modules=["o_proj"], target_parameters=PARAMETERS))
    get_peft_model(model, LdMoleConfig(target_modules=["o_proj"]))
    assert f"LD-MoLE cannot adapt them: {reason}" in caplog.text


def test_backbone_with_other_kernels_is_refused() -> None:
    model = adapted("qwen3_moe")
    model.base_model.model.set_experts_implementation("sonicmoe")
    with pytest.raises(ValueError, match="experts_implementation='sonicmoe'.*set_experts_implementation"):
        logits(model)


def test_experts_must_stay_frozen() -> None:
    model = adapted("qwen3_moe")
    model.get_submodule("base_model.model.model.layers.0.mlp.experts.base_layer").requires_grad_(True)
    with pytest.raises(ValueError, match="must stay frozen"):
        logits(model)


def test_share_of_experts_that_are_left_out_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted("qwen3_moe", target_parameters=None).unload()
    inside = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = 100 * inside / sum(p.numel() for p in model.parameters())
    assert f"{share:.0f}% of the weights of this backbone are in routed experts" in caplog.text
    assert "set target_parameters to ['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']" in caplog.text
    caplog.clear()
    for parameter in model.parameters():  # as under ZeRO-3, where a rank holds shards
        parameter.data = torch.empty(0)
    warn_if_experts_left_out(model, LdMoleConfig())
    assert f"{share:.0f}% of the weights" in caplog.text
    caplog.clear()
    adapted("qwen3_moe")
    adapt("llama")
    assert "routed experts" not in caplog.text


@pytest.mark.full
def test_training_on_two_ranks_under_zero3_equals_one_process(
    tmp_path: Path, ranks1: LocalRanks, ranks2: LocalRanks
) -> None:
    make_folder(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "backbone"))
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(MOE_SIZES | dict(vocab_size=len(tokenizer)))))
    shutil.rmtree(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    config = make_config(
        tmp_path,
        adapter={"lora_dropout": 0.0, **MOE_TARGETS},
        optimisation={"eps": 1e-4, "learning_rate": 1e-3, "max_steps": 2},
        data={"eval": None},
    )
    zero3 = tmp_path / "zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    ranks1.run(run_training, str(config), "parallelism.ep_size=1", f"run.output_dir={tmp_path}/one")
    ranks2.run(run_training, str(config), f"parallelism.deepspeed={zero3}", f"run.output_dir={tmp_path}/two")
    one, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert sum(".experts." in name for name in one) == 2 * 2 * 3
    assert one.keys() == two.keys() and max((two[name] - value).abs().max() for name, value in one.items()) < 1e-6
    assert any(value.abs().max() > 1e-4 for name, value in one.items() if "experts.down_proj.lora_B" in name)
