"""LD-MoLE as a PEFT method: files, reloading, several adapters, refusals, initial values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from ldmole_dist import LdMoleConfig
from ldmole_dist.peft_config import LINEARS
from ldmole_dist.peft_method import LdMoleLinear, tuner_of
from ldmole_dist.selftest.tiny import SIZES, micro_batch, tiny_backbone

CPU = torch.device("cpu")
E, R, H, LABELS = 4, 2, 8, 3
KINDS = ["llama", "qwen3", "classifier"]


def backbone(kind: str = "llama", dtype: torch.dtype = torch.float32, **sizes: int) -> PreTrainedModel:
    if kind == "qwen3" or (kind == "llama" and not sizes):
        return tiny_backbone(kind, dtype, CPU)
    torch.manual_seed(7)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**(SIZES | sizes))).to(dtype)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=LABELS, pad_token_id=0)).to(dtype)


def config(kind: str = "llama", **changes: Any) -> LdMoleConfig:
    settings: dict[str, Any] = dict(num_experts=E, r=R, lambda_hidden=H, lora_dropout=0.0, task_type="CAUSAL_LM")
    if kind == "classifier":
        settings |= dict(task_type="SEQ_CLS", modules_to_save=["score"])
    return LdMoleConfig(**(settings | changes))


def adapt(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    return get_peft_model(backbone(kind, dtype), config(kind, **changes))


def move(model: PeftModel, seed: int = 0) -> PeftModel:
    """Away from the start, at which an adapter changes nothing."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def logits(model: Any) -> Tensor:
    batch = micro_batch(0, CPU)
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def expected_file(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in adapter_model.safetensors, as the docstring of peft_method.py promises."""
    D, F, KV = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_key_value_heads"] * SIZES["head_dim"]
    sizes = {"q": (D, D), "k": (D, KV), "v": (D, KV), "o": (D, D), "gate": (D, F), "up": (D, F), "down": (F, D)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, (inputs, outputs) in sizes.items():
            block = "self_attn" if len(name) == 1 else "mlp"
            module = f"base_model.model.model.layers.{layer}.{block}.{name}_proj"
            shapes[f"{module}.lora_A"], shapes[f"{module}.lora_B"] = (E, R, inputs), (E, outputs, R)
            shapes[f"{module}.router.weight"] = (E, inputs)
    for size in (D, F):
        mlp = f"base_model.lambda_mlp.{size}"
        shapes |= {f"{mlp}.fc1.weight": (H, size), f"{mlp}.fc1.bias": (H,)}
        shapes |= {f"{mlp}.fc2.weight": (1, H), f"{mlp}.fc2.bias": (1,)}
    if kind == "classifier":
        shapes["base_model.model.score.weight"] = (LABELS, D)
    return shapes


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind: str) -> None:
    torch.testing.assert_close(logits(adapt(kind)), logits(backbone(kind)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_file_names_and_shapes_and_reloading(kind: str, tmp_path: Path) -> None:
    model = move(adapt(kind))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected_file(kind)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "LDMOLE"

    again = PeftModel.from_pretrained(backbone(kind), str(tmp_path))
    assert not trainable(again)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert not torch.allclose(logits(again), logits(backbone(kind)), atol=1e-2)

    further = PeftModel.from_pretrained(backbone(kind), str(tmp_path), is_trainable=True)
    assert set(trainable(further)) == set(trainable(model))
    torch.testing.assert_close(logits(further), logits(model), rtol=0, atol=0)


def test_auto_class_finds_backbone_and_method(tmp_path: Path) -> None:
    backbone().save_pretrained(tmp_path / "backbone")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "backbone"), config())
    move(model).save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_trainable_parameter_in_float32(kind: str, dtype: torch.dtype) -> None:
    model = move(adapt(kind, dtype)).train()
    parameters = trainable(model)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "base_layer" in name} == {dtype}
    batch = micro_batch(0, CPU)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert output.isfinite().all()
    tuner_of(model).context.weights.sparsity = 1.0
    (output.float().square().mean() + tuner_of(model).context.auxiliary_loss()).backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for name, p in model.named_parameters() if name not in parameters)
    assert len(parameters) == len(expected_file(kind))


def test_reloading_on_a_bf16_backbone_keeps_float32(tmp_path: Path) -> None:
    model = move(adapt("classifier", torch.bfloat16))
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    again = PeftModel.from_pretrained(backbone("classifier", torch.bfloat16), str(tmp_path), is_trainable=True)
    assert {p.dtype for p in trainable(again).values()} == {torch.float32}
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_modules_to_save_are_trained_beside_the_frozen_original() -> None:
    model = adapt("classifier")
    score = model.base_model.model.score
    assert all(p.requires_grad for p in score.modules_to_save["default"].parameters())
    assert not any(p.requires_grad for p in score.original_module.parameters())
    before = score.original_module.weight.detach().clone()
    moved = move(model)
    assert score.original_module.weight.equal(before) and not score.modules_to_save["default"].weight.equal(before)
    with_adapter = logits(moved)
    with moved.disable_adapter():
        torch.testing.assert_close(logits(moved), logits(backbone("classifier")), rtol=0, atol=0)
    torch.testing.assert_close(logits(moved), with_adapter, rtol=0, atol=0)


@pytest.fixture()
def two_adapters() -> tuple[PeftModel, Tensor, Tensor]:
    """A model with adapters "default" and "other" of different sizes, and the logits of each."""
    model = move(adapt(), seed=1)
    first = logits(model)
    model.add_adapter("other", config(num_experts=6, r=3, lambda_hidden=5, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    move(model, seed=2)
    return model, first, logits(model)


def test_several_adapters_switch(two_adapters: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, first, second = two_adapters
    plain = logits(backbone())
    assert not torch.allclose(first, second, atol=1e-2) and not torch.allclose(second, plain, atol=1e-2)
    for name, expected in (("default", first), ("other", second)):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
        assert all(f".{name}." in f"{parameter}." for parameter in trainable(model)) and trainable(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
        assert not trainable(model)
    assert all(".other." in f"{parameter}." for parameter in trainable(model)) and trainable(model)


def test_two_active_adapters_are_refused(two_adapters: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, *_ = two_adapters
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.base_model.set_adapter(["default", "other"])


def test_deleting_one_adapter_leaves_the_other(two_adapters: tuple[PeftModel, Tensor, Tensor], tmp_path: Path) -> None:
    model, first, _ = two_adapters
    model.delete_adapter("other")
    assert not any(".other" in name for name, _ in model.named_parameters())
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(expected_file("llama"))


def test_saving_one_of_several_and_loading_it_beside_another(
    two_adapters: tuple[PeftModel, Tensor, Tensor], tmp_path: Path
) -> None:
    model, first, second = two_adapters
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert "base_model.lambda_mlp.48.fc1.weight" in saved and saved["base_model.lambda_mlp.48.fc1.weight"].shape == (
        5,
        48,
    )
    again = PeftModel.from_pretrained(backbone(), str(tmp_path))
    again.load_adapter(str(tmp_path / "other"), adapter_name="second")
    torch.testing.assert_close(logits(again), first, rtol=0, atol=0)
    again.set_adapter("second")
    torch.testing.assert_close(logits(again), second, rtol=0, atol=0)


def test_merging_is_refused_and_unloading_gives_the_backbone_back() -> None:
    model = move(adapt())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert not torch.allclose(logits(model), logits(backbone()), atol=1e-2)
    bare = model.unload()
    assert not any(isinstance(module, LdMoleLinear) for module in bare.modules())
    torch.testing.assert_close(logits(bare), logits(backbone()), rtol=0, atol=0)


def test_generation_with_and_without_a_cache() -> None:
    model = move(adapt()).eval()
    prompt = dict(input_ids=torch.tensor([[0, 5, 9], [3, 4, 8]]), attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    texts = [
        model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert texts[0].equal(texts[1]) and texts[0].shape == (2, 11)
    assert not texts[0].equal(backbone().generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0))


def test_the_attention_mask_reaches_the_auxiliary_losses() -> None:
    model = adapt().train()
    batch = micro_batch(0, CPU)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert 0 < int(mask.sum()) < mask.numel()
    model(input_ids=ids, attention_mask=mask)
    context = tuner_of(model).context
    name = next(iter(context.stats))
    first = context.stats[name][1]
    model(input_ids=torch.where(mask.bool(), ids, 11), attention_mask=mask)  # other padding
    torch.testing.assert_close(context.stats[name][1], first)
    model(input_ids=ids)
    assert not torch.isclose(context.stats[name][1], first)
    assert len(context.stats) == 14


def test_an_adapted_head_is_told_which_of_the_positions_that_it_reads_are_real() -> None:
    model = adapt(target_modules=["q_proj", "lm_head"]).eval()
    seen: dict[str, Tensor | None] = {}
    context = tuner_of(model).context
    context.observer = lambda name, routing, mask_T: seen.update({name: mask_T})
    batch = micro_batch(0, CPU)
    mask = torch.ones_like(batch["attention_mask"])
    mask[1, 2:] = 0
    positions = torch.tensor([1, 3])
    model(input_ids=batch["input_ids"], attention_mask=mask, logits_to_keep=positions)
    head = seen["lm_head"]
    assert head is not None and head.equal(mask[:, positions].reshape(-1) != 0)
    assert head.any() and not head.all()


def test_unknown_targets_are_named() -> None:
    with pytest.raises(ValueError, match=r"\['query', 'value'\] name no module .*'q_proj'"):
        adapt(target_modules=["q_proj", "query", "value"])


def test_targets_by_expression_and_exclusion() -> None:
    def adapted(model: PeftModel) -> set[str]:
        return {name for name, module in model.named_modules() if isinstance(module, LdMoleLinear)}

    by_expression = adapted(adapt(target_modules=r".*layers\.1\.mlp\.(up|down)_proj"))
    assert {name.split("layers.")[1] for name in by_expression} == {"1.mlp.up_proj", "1.mlp.down_proj"}
    excluded = adapted(adapt(exclude_modules=["k_proj", "v_proj"]))
    assert len(excluded) == 2 * 5 and not any(re.search("[kv]_proj", name) for name in excluded)
    assert len(adapted(adapt())) == 2 * len(LINEARS)


class PackedLinear(nn.Linear):
    """As quantisation libraries do: a linear that is one by inheritance only."""


def test_other_than_plain_linears_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embed_tokens is a Embedding \(torch.float32\): .* plain floating-point"):
        adapt(target_modules=["q_proj", "embed_tokens"])
    packed = backbone()
    packed.model.layers[1].mlp.up_proj = PackedLinear(32, 48, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is a PackedLinear .* without quantisation"):
        get_peft_model(packed, config())
    integers = backbone()
    weight = integers.model.layers[0].self_attn.q_proj.weight
    integers.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is a Linear \(torch.int8\)"):
        get_peft_model(integers, config())


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"num_hidden_layers": 1}, "layers.1."),
        ({"num_hidden_layers": 3}, "layers.2."),
        ({"hidden_size": 48}, "needs"),
        ({"intermediate_size": 64}, "needs"),
    ],
    ids=str,
)
def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path, sizes: dict[str, int], named: str) -> None:
    adapt().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this adapter was made for another backbone") as raised:
        PeftModel.from_pretrained(backbone(**sizes), str(tmp_path))
    assert named in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["weight", "layers"])
def test_an_adapter_may_be_called_like_a_part_of_the_model(tmp_path: Path, name: str) -> None:
    saved = move(adapt())
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(backbone(), tmp_path, adapter_name=name)
    torch.testing.assert_close(logits(model), logits(saved))


def test_a_damaged_adapter_file_is_refused(tmp_path: Path) -> None:
    adapt().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.lambda_mlp.48.fc1.bias"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lambda_mlp.*48\.fc1\.bias needs \(8,\), the adapter has nothing"):
        PeftModel.from_pretrained(backbone(), str(tmp_path))


def test_a_newer_file_format_is_refused(tmp_path: Path) -> None:
    adapt().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match=r"format_version=2 is newer than this ldmole_dist reads \(1\)"):
        PeftModel.from_pretrained(backbone(), str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("num_experts", 0),
        ("lambda_hidden", -1),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lambda_eps", 0.0),
        ("lambda_eps", 1.5),
        ("router", "softmin"),
        ("lambda_init", "dead"),
    ],
)
def test_config_ranges(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        LdMoleConfig(**{field: value})


def test_config_defaults_are_the_papers() -> None:
    c = LdMoleConfig()
    assert (c.num_experts, c.r, c.lora_alpha, c.lora_dropout, c.lambda_hidden, c.lambda_eps) == (
        8,
        8,
        16,
        0.1,
        256,
        0.01,
    )
    assert c.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_initial_values_depend_on_seed_module_and_expert_only() -> None:
    torch.manual_seed(1)
    first = trainable(adapt())
    torch.manual_seed(2)
    model = get_peft_model(backbone("qwen3"), config(num_experts=6, target_modules=["down_proj", "v_proj"]))
    second = trainable(model)
    shared = set(first) & set(second)
    assert len(shared) == 2 * 2 * 3 + 8
    for name in shared:
        if "router" not in name:  # of a router's E rows there are others
            assert first[name].equal(second[name][:E] if "lora_" in name else second[name]), name
    other_seed = trainable(adapt(init_seed=1))
    assert not any(first[name].equal(other_seed[name]) for name in first if "lora_A" in name or "router" in name)


def test_authors_initialisation_is_available_by_name() -> None:
    biases = [p for name, p in trainable(adapt(lambda_init="authors")).items() if "lambda" in name and "bias" in name]
    assert len(biases) == 4 and all(bias.eq(-2.5).all() for bias in biases)
    live = trainable(adapt())
    assert not any(p.any() for name, p in live.items() if "lambda" in name and "fc1.bias" in name)


def test_scaling_is_alpha_over_r() -> None:
    models = [move(adapt(lora_alpha=alpha, target_modules=["down_proj"])) for alpha in (2, 4)]
    one, two = (model.get_base_model().model.layers[1].mlp.down_proj for model in models)
    x = torch.randn(5, SIZES["intermediate_size"])
    torch.testing.assert_close(2 * (one(x) - one.base_layer(x)), two(x) - two.base_layer(x))
    assert one.scaling["default"] == 2 / R
