"""Tiny models, adapters and micro-batches that exercise every part of the method.

The B matrices of the experts are random, because with the initial B = 0 most gradients are 0, and comparing zeros would prove
nothing. Ranks get different numbers of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ldmole_dist.loss import IGNORED
from ldmole_dist.method.context import LossWeights
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.parallel.placement import seeded
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import spread_experts, tuner_of
from ldmole_dist.tuner.state_dict import is_expert_tensor

EXPERTS, LORA_RANK, VOCABULARY = 8, 2, 64
LOSS_WEIGHTS = LossWeights(balance=0.7, sparsity=0.3, z=0.05, l1=0.2, entropy=0.1, target_k=2)
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


MOE_SIZES: dict[str, Any] = SIZES | dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
MOE_TARGETS: dict[str, Any] = dict(
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)


def tiny_backbone(architecture: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a model with two decoder layers, with the same weights in every process.

    Args:
        architecture: "llama", "qwen3" or "qwen3_moe".
        dtype: data type of the weights.
        device: device of the weights.
    """
    torch.manual_seed(7)
    model: PreTrainedModel
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE_SIZES))
    return nn.Module.to(model, dtype=dtype, device=device)


def adapted(
    backbone: PreTrainedModel,
    parallel: ExpertParallel,
    dropout: float = 0.0,
    router: str = "sparsegen",
    num_experts: int | list[int] = EXPERTS,
) -> PeftModel:
    """Adapt all linears and routed experts of every decoder layer, and return the model in training mode.

    The auxiliary losses have the coefficients `LOSS_WEIGHTS`.

    Args:
        backbone: model to adapt in place.
        parallel: placement of the experts; the weights of an expert do not depend on it.
        dropout: dropout probability of the adapters' input.
        router: name of the router.
        num_experts: number of experts of every adapted linear, or a list with one number per decoder layer.
    """
    spread_experts(backbone, parallel)
    config = LdMoleConfig(
        num_experts=num_experts,
        r=LORA_RANK,
        lora_dropout=dropout,
        router=router,  # type: ignore[arg-type]  # checked by LdMoleConfig
        lambda_hidden=16,
        task_type="CAUSAL_LM",
        **(MOE_TARGETS if isinstance(backbone, Qwen3MoeForCausalLM) else {}),
    )
    model = get_peft_model(backbone, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # The tolerances of float32 were measured with values drawn for this name.
                drawn_for = name.replace("ldmole_adapters.default.lora_B", "lora_B.default")
                first = parallel.placement(len(parameter) * parallel.size).local.start
                for local in range(len(parameter)):
                    drawn = torch.randn(parameter[local].shape, generator=seeded(1, drawn_for, first + local)) * 0.1
                    parameter[local].copy_(drawn)
            elif "router" in name:
                # Spread the initial scores, so that both sparse and dense supports occur.
                parameter.mul_(4)
    tuner_of(model).context.weights = LOSS_WEIGHTS
    return model.train()


def micro_batch(index: int, device: torch.device) -> dict[str, Tensor]:
    """Return micro-batch number `index`: random sequences with padding and answer tokens. Equal numbers give equal batches.

    Args:
        index: number of the micro-batch; also determines its length S = 5 + index % 5.
        device: device of the tensors.

    Returns:
        "input_ids", "attention_mask" (0 for padding) and "labels" (-100 except for answer tokens), each (3, S).
    """
    generator = torch.Generator().manual_seed(1000 + index)
    length = 5 + index % 5
    ids = torch.randint(0, VOCABULARY, (3, length), generator=generator)
    real = torch.arange(length) < torch.randint(2, length + 1, (3, 1), generator=generator)
    labels = ids.masked_fill(~real | (torch.rand(3, length, generator=generator) < 0.3), IGNORED)
    batch = dict(input_ids=ids, attention_mask=real.long(), labels=labels)
    return {name: value.to(device) for name, value in batch.items()}


def relative(value: Tensor, reference: Tensor) -> float:
    """Return the relative distance of two tensors: the 2-norm of `value - reference` divided by that of `reference`."""
    return float((value - reference).norm() / reference.norm().clamp_min(torch.finfo(reference.dtype).tiny))


def whole(model: PeftModel, name: str, local: Tensor) -> Tensor:
    """Return the value or gradient of a parameter for all experts, from the part that this rank holds.

    The experts are gathered over the expert-parallel group; tensors of other parameters are returned unchanged. Collective for
    experts: every rank of the group must call it.

    Args:
        model: adapted model.
        name: name of the parameter.
        local: value or gradient on this rank, with the shape that the parameter has there.
    """
    return tuner_of(model).parallel.all_gather(local) if is_expert_tensor(name) else local
