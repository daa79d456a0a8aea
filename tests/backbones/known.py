"""Checks that are known to fail, each with its reason. A test fails when one of them passes, so that its entry is removed."""

from __future__ import annotations

# Reason, checks, architectures.
_KNOWN = [
    (
        "LoRA adapts the routed experts and the router of these models with all-linear, LD-MoLE only with `target_parameters`",
        "lora_trains",
        "deepseek_v2 deepseek_v3 deepseek_v32 ernie4_5_moe flex_olmo glm4_moe glm_moe_dsa hunyuan_v1_moe minimax minimax_m2 "
        "mixtral olmoe qwen3_moe qwen3_next",
    ),
    (
        "the vision tower needs more inputs than the trace has, so that each linear is dispatched separately",
        "groups",
        "gemma4-mm idefics3 qwen2_5_vl smolvlm",
    ),
    (
        "the trace ends early, so that padding counts and linears are dispatched separately",
        "groups padding",
        "qwen4_exp switch_transformers t5gemma",
    ),
    (
        "the trace ends early, so that padding counts",
        "padding",
        "dbrx jetmoe",
    ),
    (
        "linears in a list inside a layer are taken for a layer of their own",
        "groups",
        "zamba2",
    ),
]


def known_failures(name: str) -> dict[str, str]:
    """Return the reason of each check that is known to fail on an architecture."""
    return {check: reason for reason, checks, names in _KNOWN if name in names.split() for check in checks.split()}
