"""Memory estimates: peak activations, repeated layers, shards, offload and invalid arguments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ldmole_dist.engine.ds_config import load_ds_config
from ldmole_dist.errors import UserError
from ldmole_dist.loss import answer_loss
from ldmole_dist.model.backbone import enable_gradient_checkpointing, load_backbone
from ldmole_dist.model.quantization import weight_bytes
from ldmole_dist.planner.live import LiveBytes
from ldmole_dist.planner.memory import host_memory, memory, step_activations
from ldmole_dist.planner.shapes import _shapes, meta_model, shapes_of
from ldmole_dist.planner.workload import SHIPPED, Quantization, Strategy, Workload
from ldmole_dist.planner.zero import (
    DEFAULTS,
    ParamGroup,
    bucket_flushes,
    max_overlapping_elements,
    padded_elements,
    settings,
)
from ldmole_dist.tuner.model import tuner_of
from tests.quantization import need


def llama(vocabulary: int, layers: int = 3) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )


SMALL = Workload(
    llama(300), num_experts=8, lora_rank=4, lambda_hidden=32, micro_batch=4, seq=64, active=8.0, precision="fp32"
)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vocabulary", [300, 8000])  # the peak is in a decoder layer, or in the loss
def test_peak_is_close_to_a_real_model(vocabulary: int, checkpointing: bool) -> None:
    workload = replace(SMALL, backbone=llama(vocabulary))
    model = meta_model(workload).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for mlp in (p for name, p in model.named_parameters() if name.endswith("fc2.bias")):
        torch.nn.init.constant_(mlp, -1e4)  # lambda becomes very negative, so all experts are active
    if checkpointing:
        enable_gradient_checkpointing(model)
    ids = torch.randint(0, vocabulary, (4, 64))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return answer_loss(logits, ids) + tuner_of(model).context.auxiliary_loss()

    loss().backward()  # allocate the gradients before measuring
    with LiveBytes() as live:
        loss().backward()
    kept, working = step_activations(workload, Strategy(1, 0, checkpointing=checkpointing))
    assert 0.98 < (kept + working) / live.peak < 1.2


def test_shapes_of_deep_model_equal_the_real_ones() -> None:
    workload = replace(SMALL, backbone=llama(300, layers=5))
    assert shapes_of(workload) == _shapes(meta_model(workload), workload)


def test_offload_stores_shards_on_the_host() -> None:
    device, offloaded = (memory(SMALL, Strategy(2, 3, offload=o)) for o in ("none", "optimizer+params"))
    host = host_memory(SMALL, Strategy(2, 3, offload="optimizer+params"))
    assert offloaded["optimizer"] == offloaded["gradients"] == 0 and host["optimizer"] == device["optimizer"]
    # Persistent weights of ZeRO-3 stay on the device.
    assert offloaded["backbone"] + host["backbone"] == device["backbone"] and offloaded["backbone"] > 0
    assert host_memory(SMALL, Strategy(2, 3)) == {}


def test_frozen_parameters_have_no_gradient_and_no_optimizer() -> None:
    sizes, shapes = memory(SMALL, Strategy(1, 0)), shapes_of(SMALL)
    trained = shapes.experts() + shapes.dense()
    assert sizes["gradients"] == 4 * trained and sizes["optimizer"] == 8 * trained
    assert sizes["backbone"] == 4 * shapes.frozen()
    assert memory(replace(SMALL, precision="bf16"), Strategy(1, 0))["backbone"] == 2 * shapes.frozen()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_backbone_takes_the_bytes_of_a_loaded_one(quantization: Quantization, tmp_path: Path) -> None:
    need("bitsandbytes")
    config = llama(300)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    plain = replace(SMALL, backbone=config, precision="bf16")
    workload = replace(plain, quantization=quantization)
    sizes, unquantized = memory(workload, Strategy(2, 2)), memory(plain, Strategy(2, 2))
    loaded = load_backbone(str(tmp_path), "causal_lm", "bf16", quantization=quantization)
    assert sizes["backbone"] == weight_bytes(loaded) < unquantized["backbone"]
    largest = 128 * 256  # weights of an MLP linear, which a product dequantizes
    checkpointed = [step_activations(w, Strategy(2, 2)) for w in (workload, plain)]
    assert checkpointed[0][1] - checkpointed[1][1] == 2 * largest  # in bfloat16
    others = ("experts", "adapter", "gradients", "optimizer", "activations", "gathered", "buckets")
    assert all(sizes[part] == unquantized[part] for part in others)
    with pytest.raises(UserError, match=f"does not support quantization='{quantization}' at ZeRO stage 3"):
        memory(workload, Strategy(2, 3))


def test_shard_sizes_by_hand() -> None:
    group = ParamGroup((10, 7, 3), 4)
    assert padded_elements(group, 1) == 24 and padded_elements(group, 3) == 4 * (3 + 2 + 1)
    assert max_overlapping_elements(group) == 10 + 7  # rank 1 holds elements 6 to 11
    for bucket, flushes in ((10, 2), (100, 1), (1, 3)):
        assert bucket_flushes((10, 7, 3), bucket) == flushes


def test_settings_include_the_shipped_config() -> None:
    for (stage, offload), name in SHIPPED.items():
        shipped = load_ds_config(name)["zero_optimization"]
        assert shipped["stage"] == stage and ("offload_optimizer" in shipped) == (offload != "none")
        found = settings(Strategy(4, stage, offload=offload, zero=(("sub_group_size", 5),)))
        assert found["sub_group_size"] == 5 and {k: found[k] for k in shipped} == shipped


def test_defaults_equal_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig(stage=2).model_dump(by_alias=True)
    assert {k: theirs[k] for k in DEFAULTS if k != "overlap_comm"} == {
        k: v for k, v in DEFAULTS.items() if k != "overlap_comm"
    }
    assert not theirs["overlap_comm"] and DeepSpeedZeroConfig(stage=3).overlap_comm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": 9.0}, "active=9.0 must be between 1 and num_experts=8"),
        ({"seq": 0}, "seq=0 must be at least 1"),
        ({"answer_tokens": 65}, "answer_tokens=65 must be between 1 and seq=64"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
    ],
)
def test_invalid_workload_is_explained(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": 0}, "ranks=0 must be at least 1"),
        ({"ranks": 6, "ep_size": 4}, "ep_size=4 does not divide the 6 ranks"),
        ({"ranks": 6, "ep_size": 3}, "ep_size=3 does not divide num_experts=8; use one of"),
        ({"ranks": 2, "stage": 4}, "stage=4 must be 0, 1, 2 or 3"),
        ({"ranks": 2, "stage": 1, "offload": "optimizer"}, "No config is shipped for stage=1 with offload='optimizer'"),
    ],
)
def test_invalid_strategy_is_explained(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        memory(SMALL, Strategy(**values))
