"""Build the model of a run from its config: the frozen backbone with its adapter, on this rank."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from peft import PeftModel
from tqdm import tqdm

from ldmole_dist.config import Config
from ldmole_dist.distributed import Process, raise_on_all_ranks
from ldmole_dist.engine.partitioned import partitioned_loading
from ldmole_dist.method.context import LossWeights
from ldmole_dist.model.backbone import (
    check_backbone,
    enable_gradient_checkpointing,
    load_adapter,
    load_backbone,
    new_adapter,
)
from ldmole_dist.model.quantization import weight_bytes
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import spread_experts, tuner_of


def build_model(
    config: Config, parallel: ExpertParallel, process: Process, stage: int, pad_token_id: int | None
) -> PeftModel:
    """Load the backbone, attach the adapter, and set the loss weights and gradient checkpointing.

    Collective: every rank must call it.

    Args:
        config: config of the run.
        parallel: expert-parallel group that the experts are spread over.
        process: this process.
        stage: ZeRO stage; stage 3 partitions the backbone while it is loaded, unless it is quantized.
        pad_token_id: id of the tokenizer's padding token, with which a sequence classifier finds the last token.

    Returns:
        The model in training mode, on the device of this process. At stage 3, DeepSpeed moves the partitions there later.

    Raises:
        UserError: if the backbone or the adapter cannot be loaded, or the adapter does not fit the backbone.
        PeerError: if that happens on another rank, except while an unquantized backbone is loaded at stage 3.
    """
    b, a = config.backbone, config.adapter
    torch.manual_seed(config.run.seed)  # loading a classifier initializes its new head from the global random generator
    if process.is_main:
        tqdm.write(f"loading {b.path}")
    with raise_on_all_ranks("checking the backbone"):
        check_backbone(b.path)
    # DeepSpeed partitions quantized weights only when the engine is created, so each rank first loads all of them.
    in_parts = stage == 3 and b.quantization is None
    # Loading in parts runs collectives, so it must not be inside raise_on_all_ranks: a rank that fails would enter its
    # all_gather_object while the others wait in the broadcast of a parameter.
    with (
        partitioned_loading(stage, config.parallelism.precision) if in_parts else nullcontext(),
        nullcontext() if in_parts else raise_on_all_ranks("loading the backbone"),
    ):
        backbone = load_backbone(
            b.path,
            b.task,
            config.parallelism.precision,
            labels=config.data.labels,
            attention=b.attention,
            pad_token_id=pad_token_id,
            quantization=b.quantization,
            device=process.device,
            partitioned=stage == 3,
        )
    if b.quantization is not None and process.is_main:
        tqdm.write(f"quantized to {b.quantization}: the backbone takes {weight_bytes(backbone) / 1e6:.1f} MB")
    if stage < 3:
        # nn.Module.to: the wrapper that transformers puts around PreTrainedModel.to confuses mypy.
        torch.nn.Module.to(backbone, process.device)
    spread_experts(backbone, parallel)
    with raise_on_all_ranks("attaching the adapter"):
        if a.init_from is not None:
            model = load_adapter(backbone, a.init_from, trainable=True)
        else:
            model = new_adapter(backbone, adapter_config(config))
    o = config.optimisation
    tuner_of(model).context.weights = LossWeights(
        balance=o.balance_coef,
        sparsity=o.sparsity_coef,
        z=o.z_coef,
        l1=o.l1_coef,
        entropy=o.entropy_coef,
        target_k=o.sparsity_target,
    )
    if config.parallelism.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.train()


def adapter_config(config: Config) -> LdMoleConfig:
    """Return the PEFT config of the new adapter that a run config describes."""
    values = {name: value for name, value in vars(config.adapter).items() if name != "init_from"}
    task_type = "CAUSAL_LM" if config.backbone.task == "causal_lm" else "SEQ_CLS"
    return LdMoleConfig(task_type=task_type, init_seed=config.run.seed, **values)
