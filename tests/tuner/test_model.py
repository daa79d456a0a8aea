"""LD-MoLE as a PEFT method: files, reloading, several adapters, masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from ldmole_dist.selftest.tiny import SIZES, micro_batch
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of
from tests.small_adapter import CPU, KINDS, LABELS, E, H, R, adapt, backbone, config, logits, move, trainable


def expected_file(kind: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes in adapter_model.safetensors, as in the docstring of tuner/state_dict.py."""
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
def test_new_adapter_does_not_change_logits(kind: str) -> None:
    torch.testing.assert_close(logits(adapt(kind)), logits(backbone(kind)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_file_names_shapes_and_reload(kind: str, tmp_path: Path) -> None:
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


def test_auto_class_loads_backbone_and_adapter(tmp_path: Path) -> None:
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


def test_modules_to_save_are_trained_copies_of_frozen_modules() -> None:
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
    """Return a model with adapters "default" and "other" of different sizes, and the logits of each."""
    model = move(adapt(), seed=1)
    first = logits(model)
    model.add_adapter("other", config(num_experts=6, r=3, lambda_hidden=5, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    move(model, seed=2)
    return model, first, logits(model)


def test_adapters_can_be_switched(two_adapters: tuple[PeftModel, Tensor, Tensor]) -> None:
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


def test_deleting_an_adapter_keeps_the_other(two_adapters: tuple[PeftModel, Tensor, Tensor], tmp_path: Path) -> None:
    model, first, _ = two_adapters
    model.delete_adapter("other")
    assert not any(".other" in name for name, _ in model.named_parameters())
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(expected_file("llama"))


def test_save_and_load_of_two_adapters(two_adapters: tuple[PeftModel, Tensor, Tensor], tmp_path: Path) -> None:
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


def test_merging_is_refused_and_unload_returns_the_backbone() -> None:
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


def test_attention_mask_is_applied_to_auxiliary_losses() -> None:
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


def test_adapted_head_gets_the_mask_of_logits_to_keep() -> None:
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
