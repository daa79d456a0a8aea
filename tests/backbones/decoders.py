"""Tiny decoder-only models: dense, with routed experts, and with state spaces or linear attention in place of attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.backbones.sizes import EXPERTS, HEAD_SIZE, HEADS, HIDDEN, Architecture, config, prompt, text

LINEAR_FULL = ["linear_attention", "full_attention"]
MLA: dict[str, Any] = dict(
    num_key_value_heads=HEADS
)  # multi-head latent attention has as many key heads as query heads

# The settings that a model needs beside the common sizes, by architecture.
DENSE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {},
    "cohere": {},
    "cohere2": {},
    "diffllama": {},
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {},
    "gemma": {},
    "gemma2": {},
    "gemma3-text": dict(model_type="gemma3_text"),
    "gemma3n-text": dict(model_type="gemma3n_text", num_kv_shared_layers=0, activation_sparsity_pattern=[0.95, 0.0]),
    "gemma4-text": dict(model_type="gemma4_text", global_head_dim=HEAD_SIZE),
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gpt_neox": {},
    "gptj": {},
    "granite": {},
    "hunyuan_v1_dense": {},
    "llama": {},
    "llama-tied-bias": dict(model_type="llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
}
MOE: dict[str, dict[str, Any]] = {
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=EXPERTS, moe_top_k=2),
    ),
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {},
    "ernie4_5_moe": {},
    "flex_olmo": {},
    "gemma4-moe": dict(model_type="gemma4_text", enable_moe_block=True, global_head_dim=HEAD_SIZE),
    "glm4_moe": {},
    "glm_moe_dsa": MLA,
    "gpt_oss": {},
    "granitemoe": {},
    "hunyuan_v1_moe": {},
    "jetmoe": {},
    "llama4-text": dict(model_type="llama4_text"),
    "minimax": {},
    "minimax_m2": {},
    "mistral4": MLA,
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
}
HYBRID: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1], num_hidden_layers=2),
    "falcon_h1": dict(mamba_d_ssm=2 * HIDDEN),
    "falcon_mamba": {},
    "granitemoehybrid": dict(layer_types=LINEAR_FULL),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    "kimi_linear": MLA | dict(layer_types=LINEAR_FULL, mlp_layer_types=["dense", "sparse"]),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "mamba": dict(time_step_rank=4),
    "mamba2": dict(head_dim=16),
    "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "full_attention", "mlp"]),
    "olmo_hybrid": {},
    "qwen3_5": dict(model_type="qwen3_5_text", layer_types=LINEAR_FULL),
    "qwen3_5_moe": dict(model_type="qwen3_5_moe_text", layer_types=LINEAR_FULL),
    "qwen3_next": dict(layer_types=LINEAR_FULL),
    "qwen4_exp": dict(
        model_type="qwen4_exp_text",
        layer_types=["linear_attention", "indexed_attention"],
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "rwkv": {},
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"]),
}
_MAMBA = ["dt_proj", "out_proj", "x_proj"]
# Linears that cannot be adapted: they return a tuple, do not map the last dimension of their input, or may not be called.
EXCLUDE = {
    "bamba": ["out_proj"],
    "deepseek_v4": ["o_a_proj"],
    "falcon_h1": ["out_proj"],
    "falcon_mamba": _MAMBA,
    "granitemoehybrid": ["out_proj"],
    "jamba": ["dt_proj"],
    "llama4-text": ["router"],
    "mamba": _MAMBA,
    "mamba2": ["out_proj"],
    "nemotron_h": ["out_proj"],
    "phimoe": ["router"],
    "zamba2": ["out_proj"],
}


def architectures() -> dict[str, Architecture]:
    """Return every decoder-only architecture by its name."""
    found = {}
    for name, changes in (DENSE | MOE | HYBRID).items():
        settings = partial(config, **({"model_type": name} | changes))
        # transformers lists mistral4, which reads text, only with the models that also read images.
        auto = AutoModelForImageTextToText if name == "mistral4" else AutoModelForCausalLM
        found[name] = Architecture(auto, settings, text, prompt, "CAUSAL_LM", EXCLUDE.get(name))
    return found
