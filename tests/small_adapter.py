"""Tiny backbones with an adapter, made through PEFT's API."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from ldmole_dist import LdMoleConfig
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
    """Perturb the trainable parameters: a new adapter has B = 0 and changes no output."""
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
