"""Build the model of a run without its weights, in one process, to find errors that the config alone does not show."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ldmole_dist.config import Config
from ldmole_dist.engine.check import check_with_deepspeed
from ldmole_dist.engine.ds_config import resolve_run
from ldmole_dist.errors import UserError, require_extra
from ldmole_dist.model.backbone import DTYPES, check_backbone, load_adapter, load_tokenizer, new_adapter
from ldmole_dist.model.build import adapter_config
from ldmole_dist.model.quantization import check_quantizable


def check_build(config: Config, world_size: int) -> None:
    """Build the backbone on the meta device, inject the adapter, load the tokenizer, and parse the DeepSpeed config.

    One process checks the config for all ranks.

    Args:
        config: config of the run.
        world_size: number of ranks of the run.

    Raises:
        UserError: if the backbone, its quantization, the adapter, the tokenizer or the DeepSpeed config is invalid.
    """
    b, a = config.backbone, config.adapter
    model_config = check_backbone(b.path)
    model_class: Any = AutoModelForCausalLM
    if b.task == "sequence_classification":
        assert config.data.labels is not None  # checked with the config
        model_class = AutoModelForSequenceClassification
        model_config.num_labels = len(config.data.labels)
    try:
        with torch.device("meta"):
            backbone = model_class.from_config(
                model_config, dtype=DTYPES[config.parallelism.precision], attn_implementation=b.attention
            )
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot build the model of backbone.path={b.path!r}: {error}; check backbone.task and backbone.attention"
        ) from error
    if b.quantization is not None:
        require_extra("quantization", "bitsandbytes")
        check_quantizable(backbone, b.quantization)
    with torch.device("meta"):
        if a.init_from is not None:
            load_adapter(backbone, a.init_from, trainable=True)
        else:
            new_adapter(backbone, adapter_config(config))
    load_tokenizer(b.path)
    check_with_deepspeed(resolve_run(config, world_size))
