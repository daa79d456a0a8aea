"""FLOPs compared with torch's counter on a small model."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig

from ldmole_dist.model.backbone import enable_gradient_checkpointing
from ldmole_dist.planner.activations import on_meta, run_forward
from ldmole_dist.planner.flops import PARTS, flops, forward_flops
from ldmole_dist.planner.shapes import meta_model
from ldmole_dist.planner.workload import Strategy, Workload

TOLERANCE = 0.02  # the closed forms count the gradient of the first layer's input, which is not computed

LLAMA = LlamaConfig(
    vocab_size=4000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
WORKLOAD = Workload(
    LLAMA, num_experts=4, lora_rank=4, lambda_hidden=64, micro_batch=2, seq=64, active=4.0, precision="fp32"
)
# FlopCounterMode of torch 2.13 counts attention on GPUs only.
CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}

MODULES = {
    "adapted": r"_proj$",
    "base": r"_proj\.base_layer$",
    "router": r"\.router$",
    "lambda_mlp": r"\.ldmole_lambda_mlp\.default\.\d+$",
    "head": r"\.lm_head$",
}


def counted(checkpointing: bool, backward: bool = True) -> FlopCounterMode:
    """Run a micro-batch of the real model under torch's counter."""
    model = meta_model(WORKLOAD).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        enable_gradient_checkpointing(model)
    ids = torch.randint(0, 4000, (2, 64))
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if backward:
            logits.float().mean().backward()
    return counter


@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_flops_match_torch(checkpointing: bool) -> None:
    predicted = flops(WORKLOAD, Strategy(1, 0, 1, checkpointing=checkpointing))
    assert set(predicted) == set(PARTS) and (predicted["recompute"] > 0) == checkpointing
    total = counted(checkpointing).get_total_flops()
    assert abs(sum(predicted.values()) / total - 1) < TOLERANCE, (predicted, total)
    if not checkpointing:  # the difference is the gradient of the input of the first layer's q, k and v
        T, D, columns = WORKLOAD.tokens, 256, (256 + 128 + 128) + 3 * 4 + 64 + 3 * 4 * 4  # base, routers, lambda-MLP, A
        assert sum(predicted.values()) - total == 2 * T * D * columns


def test_forward_flops_match_torch_by_part() -> None:
    """Check the forward only: torch's counter does not attribute a backward to modules."""
    by_module = counted(False, backward=False).get_flop_counts()
    sums = dict.fromkeys(MODULES, 0)
    for name, counts in by_module.items():
        for part, pattern in MODULES.items():
            sums[part] += sum(counts.values()) if re.search(pattern, name) else 0
    attention = sum(n for op, n in by_module["Global"].items() if "attention" in str(op))
    # An adapted linear consists of the frozen linear, its router, its group's lambda-MLP, and the experts.
    experts = sums["adapted"] - sums["base"] - sums["router"] - sums["lambda_mlp"]
    expected = {part: sums[part] for part in ("base", "head", "router", "lambda_mlp")}
    assert forward_flops(WORKLOAD, Strategy(1, 0, 1)) == expected | {"attention": attention, "experts": experts}
    assert all(value > 0 for value in (*expected.values(), attention, experts))


def test_flops_scale_with_the_workload() -> None:
    one = flops(WORKLOAD, Strategy(1, 0, 1, checkpointing=False))
    twice = flops(replace(WORKLOAD, accumulation=2), Strategy(1, 0, 1, checkpointing=False))
    assert twice == {part: 2 * value for part, value in one.items()}
    longer = flops(replace(WORKLOAD, seq=128), Strategy(1, 0, 1, checkpointing=False))
    assert longer["attention"] == 4 * one["attention"] and longer["base"] == 2 * one["base"]
    answers = flops(replace(WORKLOAD, answer_tokens=16), Strategy(1, 0, 1, checkpointing=False))
    assert answers["head"] == one["head"] / 4 and answers["base"] == one["base"]
    # Many experts on a CPU compute active pairs only, so expert parallelism does not change the total.
    many = replace(WORKLOAD, num_experts=64, lora_rank=16, active=2.0, on_cpu=True)
    parallel, local = flops(many, Strategy(2, 0, 2, "all_to_all")), flops(many, Strategy(2, 0, 1))
    assert parallel["experts"] == pytest.approx(local["experts"])


def test_forward_runs_on_the_meta_device() -> None:
    model = meta_model(WORKLOAD, 1)
    with on_meta():
        assert run_forward(model, WORKLOAD).device.type == "meta"
