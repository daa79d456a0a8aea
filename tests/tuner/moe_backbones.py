"""Tiny random models of MoE backbones, and adapters for their routed experts."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from peft import PeftModel, get_peft_model

from ldmole_dist import LdMoleConfig

VOCABULARY, D, I, J, K = (
    64,
    32,
    24,
    4,
    2,
)  # hidden size, hidden size of base experts, base experts, of which each token has K
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]

COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    num_experts_per_tok=K,
    pad_token_id=0,
)
SHARED: dict[str, Any] = dict(
    intermediate_size=48,
    moe_intermediate_size=I,
    n_routed_experts=J,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
)
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8
)
FAMILIES: dict[str, Any] = {
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**COMMON, head_dim=8, intermediate_size=48, moe_intermediate_size=I, num_experts=J)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**COMMON, intermediate_size=I, num_local_experts=J)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**COMMON, intermediate_size=I, num_experts=J)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**COMMON, head_dim=8, intermediate_size=I, num_local_experts=J)
    ),
    "glm4_moe": lambda: hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**COMMON, head_dim=8, **SHARED)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**(COMMON | SHARED | LATENT))),
    "aria_text": lambda: hf.AriaTextForCausalLM(
        hf.AriaTextConfig(**COMMON, intermediate_size=I, moe_num_experts=J, moe_topk=K)
    ),
    "granitemoe": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(**COMMON, intermediate_size=I, num_local_experts=J)
    ),
}


def backbone(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model whose biases are not zero."""
    torch.manual_seed(3)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.to(dtype)


def adapted(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    """Return the model of a family with an adapter on its routed experts and an attention linear."""
    settings: dict[str, Any] = dict(num_experts=4, r=2, lambda_hidden=8, lora_dropout=0.0, task_type="CAUSAL_LM")
    settings |= dict(target_modules=["o_proj"], target_parameters=PARAMETERS)
    return get_peft_model(backbone(family, dtype), LdMoleConfig(**(settings | changes)))
