"""LdMoleConfig: targets, ranges, defaults, and adapters that do not fit a backbone."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldmole_dist import LdMoleConfig
from ldmole_dist.config import Adapter
from ldmole_dist.config.adapter import LINEARS, AdapterFields
from ldmole_dist.selftest.tiny import SIZES
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.targets import default_targets
from tests.small_adapter import E, R, adapt, backbone, config, logits, move, trainable


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['query', 'value'\] match no module .*'q_proj'"):
        adapt(target_modules=["q_proj", "query", "value"])


def test_targets_by_expression_and_exclusion() -> None:
    def adapted(model: PeftModel) -> set[str]:
        return {name for name, module in model.named_modules() if isinstance(module, LdMoleLinear)}

    by_expression = adapted(adapt(target_modules=r".*layers\.1\.mlp\.(up|down)_proj"))
    assert {name.split("layers.")[1] for name in by_expression} == {"1.mlp.up_proj", "1.mlp.down_proj"}
    excluded = adapted(adapt(exclude_modules=["k_proj", "v_proj"]))
    assert len(excluded) == 2 * 5 and not any(re.search("[kv]_proj", name) for name in excluded)
    assert len(adapted(adapt())) == 2 * len(LINEARS)


class RouterLinear(nn.Linear):
    """A linear that returns more than its output, like the routers of some backbones."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(input)
        return y, y


def test_modules_that_are_no_linear_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot adapt .*embed_tokens: this Embedding is not a linear; leave it out"):
        adapt(target_modules=["q_proj", "embed_tokens"])
    other = backbone()
    other.model.layers[1].mlp.up_proj = RouterLinear(32, 48, bias=False)
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj: this RouterLinear does not map \(\.\.\., 32\) to a tensor"):
        get_peft_model(other, config())
    integers = backbone()
    weight = integers.model.layers[0].self_attn.q_proj.weight
    integers.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj: this Linear has weights of torch.int8; load the backbone without"):
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
def test_adapter_of_another_backbone_is_refused(tmp_path: Path, sizes: dict[str, int], named: str) -> None:
    adapt().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this adapter was made for another backbone") as raised:
        PeftModel.from_pretrained(backbone(**sizes), str(tmp_path))
    assert named in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["weight", "layers"])
def test_adapter_may_have_the_name_of_a_module(tmp_path: Path, name: str) -> None:
    saved = move(adapt())
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(backbone(), tmp_path, adapter_name=name)
    torch.testing.assert_close(logits(model), logits(saved))


def test_incomplete_adapter_file_is_refused(tmp_path: Path) -> None:
    adapt().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.lambda_mlp.48.fc1.bias"]
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"lambda_mlp.*48\.fc1\.bias with shape \[8\], but in the adapter it is missing"
    ):
        PeftModel.from_pretrained(backbone(), str(tmp_path))


def test_newer_file_format_is_refused(tmp_path: Path) -> None:
    adapt().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(
        ValueError, match=r"format_version=2 is newer than the version that this ldmole_dist reads \(1\)"
    ):
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
def test_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        LdMoleConfig(**{field: value})


def test_run_config_and_peft_config_share_their_fields() -> None:
    shared = {field.name: field.metadata["help"] for field in fields(AdapterFields)}
    assert {field.name for field in fields(Adapter)} == shared.keys() | {"init_from"}
    assert LdMoleConfig().target_modules is None  # PEFT's configs choose the default by the model
    for name, help_text in shared.items():
        if name == "target_modules":
            continue
        assert getattr(Adapter(), name) == getattr(LdMoleConfig(), name)
        assert next(field.metadata["help"] for field in fields(LdMoleConfig) if field.name == name) == help_text


def test_adapter_config_of_version_0_1_loads(tmp_path: Path) -> None:
    saved = {
        "base_model_name_or_path": "backbone",
        "format_version": 1,
        "init_seed": 3,
        "lambda_eps": 0.01,
        "lambda_hidden": 16,
        "lambda_init": "live",
        "lora_alpha": 16,
        "num_experts": [2, 4],
        "peft_type": "LDMOLE",
        "r": 4,
        "router": "topk",
        "target_modules": ["q_proj"],
        "train_experts": False,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LdMoleConfig)
    assert {name: getattr(loaded, name) for name in saved} == saved


def test_defaults_are_those_of_the_paper() -> None:
    c = LdMoleConfig()
    found = (c.num_experts, c.r, c.lora_alpha, c.lora_dropout, c.lambda_hidden, c.lambda_eps)
    assert found == (8, 8, 16, 0.1, 256, 0.01)
    assert default_targets(backbone("qwen3")) == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


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
    assert one.ldmole_adapters["default"].scaling == 2 / R
