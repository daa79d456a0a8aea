"""Quantized base layers: loss and gradients equal those on the same weights, dequantized."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

from ldmole_dist import LdMoleConfig, LossWeights, tuner_of
from ldmole_dist.config.adapter import LINEARS
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.quantized import UNTESTED_PACKAGES
from ldmole_dist.tuner.targets import why_not_adaptable
from tests.quantization import need
from tests.small_adapter import move

SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(5))
BITSANDBYTES = {
    "nf4": dict(quant_type="nf4"),
    "fp4": dict(quant_type="fp4"),
    "stored as bfloat16": dict(quant_type="nf4", quant_storage=torch.bfloat16),
}
TORCHAO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig")


@pytest.fixture
def more_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the folder of torchao and HQQ (CONTRIBUTING.md) to the path.

    They are not installed beside transformers, which would import them in each process of each test.
    """
    if folder := os.environ.get("LDMOLE_QUANTIZATION_PACKAGES"):
        monkeypatch.syspath_prepend(folder)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def quantize(model: LlamaForCausalLM, kind: str) -> LlamaForCausalLM:
    """Quantize all linears of the decoder layers."""
    if kind in TORCHAO:
        import torchao.quantization as ao

        ao.quantize_(model.model, getattr(ao, kind)())
        return model
    for name, linear in linears_of(model).items():
        model.set_submodule(name, quantized(linear, kind))
    return model


def quantized(linear: nn.Linear, kind: str) -> nn.Module:
    D, O, dtype = linear.in_features, linear.out_features, linear.weight.dtype
    if kind == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        return HQQLinear(linear, BaseQuantizeConfig(nbits=4, group_size=32), compute_dtype=dtype, device="cpu")
    import bitsandbytes as bnb

    bias = linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(D, O, bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(D, O, bias, compute_dtype=dtype, **BITSANDBYTES[kind])
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def dequantized(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return an unquantized model with the dequantized weights of a quantized model."""
    plain = llama(model.dtype)
    with torch.no_grad():
        for name, linear in linears_of(plain).items():
            layer: Any = model.get_submodule(name)
            if type(layer).__name__ == "Linear8bitLt":
                # The formula of bitsandbytes in training on a CPU. Its dequantization function rounds differently.
                weight = layer.weight.to(model.dtype) * (layer.weight.SCB.unsqueeze(1) * (1.0 / 127.0))
            else:
                weight = dequantize_module_weight(layer)
            linear.weight.copy_(weight.view(linear.weight.shape))
            if layer.bias is not None:
                linear.bias.copy_(layer.bias)
    return plain


def adapt(model: Any, **changes: Any) -> PeftModel:
    # PEFT's "all-linear" finds only subclasses of nn.Linear, not HQQ's.
    settings: dict[str, Any] = dict(num_experts=4, r=2, lambda_hidden=8, lora_dropout=0.0, target_modules=list(LINEARS))
    adapted = move(get_peft_model(model, LdMoleConfig(task_type="CAUSAL_LM", **(settings | changes))))
    tuner_of(adapted).context.weights = LossWeights(balance=0.5, sparsity=0.3)
    return adapted


def loss_and_gradients(model: Any) -> dict[str, Tensor]:
    loss = model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
    loss = loss + tuner_of(model).context.auxiliary_loss()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def check_equals_dequantized(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = quantize(llama(dtype), kind)
    plain = adapt(dequantized(model))
    ours = adapt(model)
    linears = [m for m in ours.modules() if isinstance(m, LdMoleLinear)]
    assert sorted(len(m.groups["default"].linears) for m in linears) == sorted(2 * [3, 3, 3, 1, 2, 2, 1])
    assert len(linears) == 2 * 7 and {m.ldmole_adapters["default"].lora_A.dtype for m in linears} == {torch.float32}
    found, expected = loss_and_gradients(ours), loss_and_gradients(plain)
    assert found.keys() == expected.keys() and len(found) > 2 * 7 * 3
    for name, value in expected.items():
        assert value.isfinite().all() and value.abs().sum() > 0, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), name
    ours.gradient_checkpointing_enable()
    for name, value in loss_and_gradients(ours).items():
        assert (found[name] - value).norm() <= 1e-6 * value.norm(), name
    with torch.no_grad(), ours.disable_adapter():
        assert ours.eval()(input_ids=IDS).logits.equal(model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*BITSANDBYTES, "int8"])
def test_bitsandbytes_equals_dequantized(kind: str, dtype: torch.dtype) -> None:
    need("bitsandbytes")
    check_equals_dequantized(kind, dtype, tolerance=0.0)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TORCHAO)
def test_torchao_equals_dequantized(kind: str, dtype: torch.dtype, more_packages: None) -> None:
    need("torchao")
    check_equals_dequantized(kind, dtype, tolerance=1e-4 if dtype == torch.float32 else 0.3)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hqq_equals_dequantized(dtype: torch.dtype, more_packages: None) -> None:
    need("hqq")
    check_equals_dequantized("hqq", dtype, tolerance=0.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_gpt2_loaded_by_transformers_trains_and_is_saved(bits: int, tmp_path: Path) -> None:
    need("bitsandbytes")
    torch.manual_seed(3)
    sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes)).save_pretrained(tmp_path / "backbone")

    def load() -> Any:
        quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        return GPT2LMHeadModel.from_pretrained(tmp_path / "backbone", quantization_config=quantization)

    kind = "Linear4bit" if bits == 4 else "Linear8bitLt"
    bare = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    model: Any = adapt(bare, target_modules="all-linear")
    adapted = [m for m in model.modules() if isinstance(m, LdMoleLinear)]
    assert {type(m.base_layer).__name__ for m in adapted} == {kind} and len(adapted) == 2 * 4
    assert all(value.abs().sum() > 0 for value in loss_and_gradients(model).values())
    model.save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(load(), str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = [m.eval()(input_ids=IDS).logits for m in (model, again)]
    assert logits[0].equal(logits[1])


def test_evaluation_on_a_cpu_with_bfloat16_keeps_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    need("bitsandbytes")
    import bitsandbytes.nn.modules as bnb

    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: True)
    before = adapt(quantize(llama(), "nf4"))
    expected = loss_and_gradients(before)
    after: Any = adapt(quantize(llama(), "nf4"))
    with torch.no_grad():
        after.eval()(input_ids=IDS)
    assert all(value.equal(expected[name]) for name, value in loss_and_gradients(after).items())

    packed: Any = quantize(llama(), "nf4").eval()
    layer = packed.model.layers[0].mlp.up_proj
    layer.weight.data, layer.weight.quant_state = bnb._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert "repacked for inference" in str(why_not_adaptable(layer))
    with pytest.raises(ValueError, match=r"cannot adapt model.layers.0.mlp.up_proj: this Linear4bit was repacked"):
        adapt(packed)


def stand_in(package: str) -> nn.Module:
    """Return a module of a class that looks like one of `package`."""
    layer = type("QuantLinear", (nn.Module,), {"__module__": f"{package}.nn.linear"})()
    layer.in_features, layer.out_features = 4, 8
    layer.register_buffer("qweight", torch.zeros(4, 1, dtype=torch.int32))
    return layer


@pytest.mark.parametrize("package", UNTESTED_PACKAGES)
def test_untested_package_is_refused(package: str) -> None:
    assert f"is quantized by {package}, which is not tested" in str(why_not_adaptable(stand_in(package)))
    model = llama()
    model.set_submodule("model.layers.0.mlp.up_proj", stand_in(package))
    with pytest.raises(ValueError, match=f"this QuantLinear is quantized by {package}"):
        adapt(model, target_modules=["up_proj"])


def test_fp8_weights_are_refused() -> None:
    assert "has weights of torch.float8_e4m3fn" in str(why_not_adaptable(FP8Linear(64, 64)))


def test_8_bit_layer_with_16_bit_weights_is_refused() -> None:
    need("bitsandbytes")
    import bitsandbytes as bnb

    assert "has_fp16_weights=True" in str(why_not_adaptable(bnb.nn.Linear8bitLt(8, 8)))


@pytest.mark.parametrize("kind", ["nf4", "stored as bfloat16", "int8"])
def test_quantized_module_to_save_is_refused(kind: str) -> None:
    need("bitsandbytes")
    with pytest.raises(ValueError, match="includes model.layers.0.self_attn.o_proj, whose weights are quantized"):
        adapt(quantize(llama(), kind), target_modules=["q_proj"], modules_to_save=["o_proj"])
    adapt(quantize(llama(), kind), target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.mark.full
def test_module_to_save_quantized_by_torchao_is_refused(more_packages: None) -> None:
    need("torchao")
    with pytest.raises(ValueError, match="whose weights are quantized"):
        adapt(quantize(llama(), TORCHAO[0]), target_modules=["q_proj"], modules_to_save=["o_proj"])


@pytest.mark.full
def test_torchao_that_quantizes_inputs_or_is_not_known_is_refused(more_packages: None) -> None:
    need("torchao")
    import torchao.quantization as ao
    from torchao.utils import TorchAOBaseTensor

    for config in (ao.Int8DynamicActivationInt8WeightConfig(), ao.Int8DynamicActivationIntxWeightConfig()):
        linear = nn.Sequential(nn.Linear(64, 64))
        ao.quantize_(linear, config)
        assert "quantizes its input too" in str(why_not_adaptable(linear[0])), config
    unknown = copy.copy(linear[0])
    unknown.weight = nn.Parameter(unknown.weight)
    unknown.weight.__class__ = type("NewTensor", (TorchAOBaseTensor,), {"__module__": "torchao.new"})
    assert "torchao's NewTensor, which is not tested" in str(why_not_adaptable(unknown))


@pytest.mark.full
def test_backend_of_hqq_without_a_test_is_refused(monkeypatch: pytest.MonkeyPatch, more_packages: None) -> None:
    need("hqq")
    from hqq.core.quantize import HQQBackend, HQQLinear

    layer = quantized(nn.Linear(64, 64), "hqq")
    assert why_not_adaptable(layer) is None
    monkeypatch.setattr(HQQLinear, "backend", HQQBackend.ATEN_FORWARD_INT8)
    assert "HQQ's backend ATEN_FORWARD_INT8" in str(why_not_adaptable(layer))
