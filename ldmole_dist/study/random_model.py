"""Build models with random weights and their engines, for the benchmarks and the scaling study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ldmole_dist.config import Optimisation
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import load_ds_config, resolve_ds_config
from ldmole_dist.engine.partitioned import partitioned_loading
from ldmole_dist.method.context import LossWeights
from ldmole_dist.model.backbone import DTYPES
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import spread_experts, tuner_of


def llama_config(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **other: Any
) -> LlamaConfig:
    """Return the config of a Llama.

    Args:
        hidden: hidden size.
        intermediate: hidden size of the MLP.
        layers: number of decoder layers.
        heads: number of attention heads.
        kv_heads: number of key-value heads.
        vocabulary: vocabulary size.
        other: further fields of `LlamaConfig`.
    """
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **other,
    )


def random_model(
    config: PretrainedConfig,
    adapter: Mapping[str, Any],
    device: torch.device,
    precision: str = "fp32",
    parallel: ExpertParallel | None = None,
    stage: int = 0,
) -> PeftModel:
    """Build a causal language model with random weights and add a new adapter. Collective: every rank must call it.

    The load-balancing loss has coefficient 1, and the model is in training mode.

    Args:
        config: config of the backbone.
        adapter: fields of `LdMoleConfig`; without `target_modules`, all linears of the decoder layers are adapted.
        device: device to move the weights to; ZeRO stage 3 places them itself.
        precision: precision of the frozen weights: "fp32", "bf16" or "fp16".
        parallel: expert parallelism; by default every rank holds all experts.
        stage: ZeRO stage; 3 partitions the weights as they are created.

    Returns:
        The model, with the same weights on every rank, except that each rank holds only its share of the experts.
    """
    torch.manual_seed(0)  # gives every rank the same weights
    with partitioned_loading(stage, precision):
        backbone = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    if stage < 3:
        nn.Module.to(backbone, device)
    spread_experts(backbone, parallel or ExpertParallel())
    model = get_peft_model(backbone, LdMoleConfig(task_type="CAUSAL_LM", **adapter))
    tuner_of(model).context.weights = LossWeights(balance=1.0)
    return model.train()


def engine_for(
    model: PeftModel,
    deepspeed: str = "zero2",
    micro_batch: int = 1,
    accumulation: int = 1,
    precision: str = "fp32",
    ep_size: int = 1,
    zero: Iterable[tuple[str, int]] = (),
) -> Engine:
    """Return an engine that trains the model with a constant learning rate. Collective: every rank must call it.

    Args:
        model: model to train.
        deepspeed: name of a config in ds_configs/.
        micro_batch: sequences per rank and forward.
        accumulation: micro-batches per optimizer step.
        precision: "fp32", "bf16" or "fp16".
        ep_size: number of ranks that share one copy of the experts.
        zero: (name, value) pairs that override settings in the config's section `zero_optimization`.
    """
    settings = load_ds_config(deepspeed)
    settings["zero_optimization"].update(dict(zero))
    ds_config = resolve_ds_config(
        settings,
        micro_batch_size=micro_batch,
        accumulation=accumulation,
        max_grad_norm=1.0,
        precision=precision,
        ep_size=ep_size,
    )
    return Engine(model, ds_config, Optimisation(schedule="constant"))
