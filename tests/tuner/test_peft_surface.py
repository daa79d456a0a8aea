"""What PEFT offers beside injecting and saving: trainable state, loading without memory, dtypes, statuses, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ldmole_dist import LdMoleConfig, LossWeights, tuner_of
from ldmole_dist.selftest.tiny import SIZES, micro_batch
from ldmole_dist.tuner.layer import LdMoleLinear
from tests.small_adapter import CPU, R, adapt, backbone, config, logits, move, trainable

BF16 = torch.bfloat16


def linears(model: Any) -> dict[str, LdMoleLinear]:
    return {m.name: m for m in model.modules() if isinstance(m, LdMoleLinear)}


def saved(model: PeftModel, folder: Path) -> str:
    model.save_pretrained(str(folder))
    return str(folder)


def tied(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"tie_word_embeddings": True}))).to(dtype)


def opt() -> OPTForCausalLM:
    torch.manual_seed(7)
    sizes = dict(hidden_size=16, word_embed_proj_dim=16, num_attention_heads=2, ffn_dim=24, vocab_size=64)
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, max_position_embeddings=32))


def test_every_parameter_has_the_prefix_and_the_name_of_its_adapter() -> None:
    model = adapt()
    assert trainable(model) and all("ldmole_" in name and ".default." in name for name in trainable(model))
    assert model.base_model.prefix == "ldmole_"


# --- trainable state ---------------------------------------------------------------------------------------------------------


def test_loading_a_frozen_adapter_leaves_the_active_one_trainable(tmp_path: Path) -> None:
    folder = saved(adapt(), tmp_path)
    model = adapt()
    before = set(trainable(model))
    model.load_adapter(folder, adapter_name="frozen")
    assert set(trainable(model)) == before
    model.load_adapter(folder, adapter_name="trained", is_trainable=True)
    assert set(trainable(model)) == before | {name.replace(".default.", ".trained.") for name in before}
    model.set_requires_grad("default", requires_grad=False)
    assert all(".trained." in name for name in trainable(model)) and len(trainable(model)) == len(before)


def test_frozen_experts_stay_frozen() -> None:
    model = adapt(train_experts=False)
    model.set_requires_grad("default")
    assert trainable(model) and not any("lora_" in name for name in trainable(model))


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["q_proj", "lm_head"], "num_experts": [2, 4]}, {"rank_pattern": {"no": 2}}]
)
def test_failed_add_adapter_leaves_the_model_as_it_was(changes: dict[str, Any]) -> None:
    model = move(adapt(target_modules=["v_proj"]))
    before, expected, parameters = set(trainable(model)), logits(model), {n for n, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="no adapted linear|not in a numbered"):
        model.add_adapter("other", config(**changes))
    assert {n for n, _ in model.named_parameters()} == parameters and set(trainable(model)) == before
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def test_failed_injection_leaves_the_backbone_as_it_was() -> None:
    bare = backbone()
    names = [name for name, _ in bare.named_modules()]
    with pytest.raises(ValueError, match="no adapted linear"):
        get_peft_model(bare, config(rank_pattern={"no": 2}))
    assert [name for name, _ in bare.named_modules()] == names
    assert not bare._forward_hooks and not bare._forward_pre_hooks


# --- loading and dtypes ------------------------------------------------------------------------------------------------------


def test_low_cpu_mem_usage(tmp_path: Path) -> None:
    model = move(adapt(dtype=BF16))
    folder = saved(model, tmp_path)
    empty = get_peft_model(backbone(dtype=BF16), config(), low_cpu_mem_usage=True)
    assert {p.device.type for p in trainable(empty).values()} == {"meta"}
    again = PeftModel.from_pretrained(backbone(dtype=BF16), folder, low_cpu_mem_usage=True)
    again.load_adapter(folder, adapter_name="other", low_cpu_mem_usage=True)
    adapters = {name: p for name, p in again.named_parameters() if "ldmole_" in name}
    assert {p.device.type for p in adapters.values()} == {"cpu"} and {p.dtype for p in adapters.values()} == {
        torch.float32
    }
    for name in ("default", "other"):
        again.set_adapter(name)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_autocast_adapter_dtype_is_honored(tmp_path: Path) -> None:
    model = get_peft_model(backbone(dtype=BF16), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in trainable(model).values()} == {BF16}
    model.add_adapter("other", config(), autocast_adapter_dtype=True)
    assert {p.dtype for name, p in model.named_parameters() if ".other." in name} == {torch.float32}
    model(**micro_batch(0, CPU)).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == BF16 for p in trainable(model).values())


@pytest.mark.parametrize("module", ["embed_tokens", "norm", "layers.0.input_layernorm", "lm_head"])
def test_modules_to_save_in_a_bf16_backbone(module: str, tmp_path: Path) -> None:
    model = adapt(dtype=BF16, target_modules=["q_proj"], modules_to_save=[module])
    output = model(**micro_batch(0, CPU))
    assert output.logits.dtype == (torch.float32 if module == "lm_head" else BF16)
    output.loss.backward()
    copies = {name: p for name, p in trainable(model).items() if "modules_to_save" in name}
    assert copies and all(p.dtype == torch.float32 and p.grad is not None for p in copies.values())
    again = PeftModel.from_pretrained(backbone(dtype=BF16), saved(move(model), tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_tied_embeddings_are_saved_and_loaded(tmp_path: Path) -> None:
    model = get_peft_model(tied(), config(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    folder = saved(move(model), tmp_path / "untied")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tied(), folder)), logits(model), rtol=0, atol=0)
    changes: dict[str, Any] = dict(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    model = move(get_peft_model(tied(), config(**changes)))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.modules_to_save["default"].weight is embedding.modules_to_save["default"].weight
    again = PeftModel.from_pretrained(tied(), saved(model, tmp_path / "tied"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    model = move(get_peft_model(tied(), config(target_modules=["q_proj"])))
    model.save_pretrained(str(tmp_path / "all"), save_embedding_layers=True)
    again = PeftModel.from_pretrained(tied(), str(tmp_path / "all"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_save_pretrained_writes_the_tensors_that_are_given(tmp_path: Path) -> None:
    model = move(adapt())
    averaged = {name: value * 0.5 for name, value in model.state_dict().items()}
    model.save_pretrained(str(tmp_path), state_dict=averaged)
    written = load_file(tmp_path / "adapter_model.safetensors")
    key, name = "base_model.lambda_mlp.32.fc1.weight", "base_model.ldmole_lambda_mlp.default.32.fc1.weight"
    torch.testing.assert_close(written[key], model.state_dict()[name] * 0.5, rtol=0, atol=0)
    assert all(value.abs().max() > 0 for value in written.values())


# --- copies, statuses, names -------------------------------------------------------------------------------------------------


def test_a_trained_model_can_be_copied() -> None:
    model = move(adapt())
    tuner_of(model).context.weights = LossWeights(balance=1.0)
    output = model.train()(**micro_batch(0, CPU))
    (output.loss + tuner_of(model).context.auxiliary_loss()).backward()
    copied = copy.deepcopy(model)
    assert tuner_of(copied).context.weights.balance == 1.0 and not tuner_of(copied).context.terms
    torch.testing.assert_close(logits(copied), logits(model), rtol=0, atol=0)


def test_unload_leaves_no_hooks_and_no_wrappers() -> None:
    bare = adapt(router_input="hidden", target_modules=["q_proj"]).unload()
    assert not bare._forward_hooks and not bare._forward_pre_hooks and not linears(bare)
    assert bare.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2).shape == (1, 4)  # with a key-value cache


def test_disabled_adapter_runs_no_forward_for_hidden_states() -> None:
    model = move(adapt(router_input="hidden", target_modules=["q_proj"])).eval()
    with model.disable_adapter():
        assert model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2).shape == (1, 4)
    with pytest.raises(ValueError, match="key-value cache"):
        model(torch.ones(1, 2, dtype=torch.long), use_cache=True)


def test_status_name_and_sizes() -> None:
    model = adapt(target_modules=["down_proj"])
    assert model.get_model_status().peft_types == {"default": "LDMOLE"}
    status = model.get_layer_status()
    assert (
        len(status) == 2
        and status[0].requires_grad == {"default": True}
        and status[0].available_adapters == ["default"]
    )
    (linear, _) = linears(model).values()
    assert (linear.in_features, linear.out_features) == (48, 32) and repr(linear).startswith("ldmole.Linear(")


def test_what_cannot_work_is_refused_by_name() -> None:
    model = adapt()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.unmerge_adapter()
    with pytest.raises(ValueError, match="adapter_names is not supported"):
        model(**micro_batch(0, CPU), adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="adapts only linears"):
        get_peft_model(tied(), config(target_modules=["lm_head"], ensure_weight_tying=True))
    replica = model.base_model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel is not supported"):
        replica(torch.ones(1, 2, dtype=torch.long))


# --- the fields of LoraConfig ------------------------------------------------------------------------------------------------


def test_rank_and_alpha_patterns(tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(
        rank_pattern={"q_proj": 3, r"layers\.1.*down_proj": 5}, alpha_pattern={"v_proj": 6.0}
    )
    model = adapt(use_rslora=True, **changes)
    for name, linear in linears(model).items():
        adapter = linear.ldmole_adapters["default"]
        r = 3 if name.endswith("q_proj") else 5 if "layers.1" in name and name.endswith("down_proj") else R
        assert adapter.lora_A.shape[1] == adapter.lora_B.shape[2] == r
        assert adapter.scaling == pytest.approx((6 if name.endswith("v_proj") else 16) / math.sqrt(r)), name
    again = PeftModel.from_pretrained(backbone(), saved(move(model), tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    with pytest.raises(ValueError, match="alpha_pattern has the key 'w', which matches no adapted linear"):
        adapt(alpha_pattern={"w": 3})


def test_layers_to_transform() -> None:
    assert all(".layers.1." in name for name in linears(adapt(target_modules=["q_proj"], layers_to_transform=1)))
    model = adapt(layers_to_transform=[0], layers_pattern="layers")
    assert len(linears(model)) == 7 and all(".layers.0." in name for name in linears(model))
    model = get_peft_model(opt(), config(layers_to_transform=[1]))
    assert len(linears(model)) == 6 and all(".layers.1." in name for name in linears(model))
    with pytest.raises(ValueError, match="layers_to_transform=1 needs a list of names"):
        config(target_modules="all-linear", layers_to_transform=1)
    with pytest.raises(ValueError, match="layers_pattern='h' has no effect without layers_to_transform"):
        config(layers_pattern="h")


def test_default_targets() -> None:
    assert {name.rpartition(".")[2] for name in linears(adapt())} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    model = get_peft_model(opt(), config())
    assert {name.rpartition(".")[2] for name in linears(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
        "fc2",
    }
    model.add_adapter("other", config())
    with pytest.raises(ValueError, match="or set target_modules to 'all-linear'"):
        get_peft_model(opt(), config(target_modules=["gate_proj"]))


def test_targets_as_a_set_are_saved_sorted(tmp_path: Path) -> None:
    settings = config(target_modules={"v_proj", "q_proj"}, exclude_modules={"layers.0.self_attn.q_proj"})
    model = get_peft_model(backbone(), settings)
    assert len(linears(model)) == 3
    settings.save_pretrained(str(tmp_path))
    assert LdMoleConfig.from_pretrained(str(tmp_path)).target_modules == ["q_proj", "v_proj"]


def test_trainable_tokens(tmp_path: Path) -> None:
    model = adapt(target_modules=["q_proj"], trainable_token_indices=[1, 3])
    assert sum("trainable_tokens" in name for name in trainable(model)) == 1
    model(**micro_batch(0, CPU)).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())
    again = PeftModel.from_pretrained(backbone(), saved(move(model), tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_random_initial_weights() -> None:
    assert not torch.allclose(logits(adapt(init_weights=False)), logits(backbone()), atol=1e-3)
    assert all(linear.ldmole_adapters["default"].lora_B.any() for linear in linears(adapt(init_weights=False)).values())


# --- the model card ----------------------------------------------------------------------------------------------------------


def test_model_card(tmp_path: Path) -> None:
    model = adapt()
    model.add_adapter("other", config())
    for _ in range(2):  # saving again does not repeat the text
        model.save_pretrained(str(tmp_path))
    (card,) = tmp_path.rglob("README.md")
    _, header, text = card.read_text().split("---\n", 2)
    assert {"ldmole_dist", "peft"} <= set(yaml.safe_load(header)["tags"])
    assert text.count("import ldmole_dist") == text.count("from peft import PeftModel") == 1
    assert "arxiv.org/abs/2509.25684" in text and "ICLR 2026" in text and "PEFT" in text
    LdMoleConfig().save_pretrained(str(tmp_path / "config"))
    assert not (tmp_path / "config" / "README.md").exists()


def test_modules_of_a_plain_module() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), LdMoleConfig(target_modules=["0"])
    )
    assert model(torch.ones(3, 4)).shape == (3, 2)


def test_the_tuner_does_not_hide_the_layers_of_a_model() -> None:
    model = get_peft_model(backbone().model, LdMoleConfig(target_modules=["q_proj"]))
    assert isinstance(model.layers, nn.ModuleList) and model.layers is model.base_model.model.layers
