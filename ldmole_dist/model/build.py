"""Build the model of a run: the frozen backbone with its adapter, on this rank."""

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
from ldmole_dist.parallel.dispatch import ExpertParallel
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import spread_experts, tuner_of


def build_model(
    config: Config, parallel: ExpertParallel, process: Process, stage: int, pad_token_id: int | None
) -> PeftModel:
    """The backbone with its adapter, ready for the engine; every rank calls it.

    Raises:
        UserError: where backbone and adapter do not go together.
    """
    b, a = config.backbone, config.adapter
    torch.manual_seed(config.run.seed)  # a new classification head is drawn when the backbone is loaded
    if process.is_main:
        tqdm.write(f"loading {b.path}")
    with raise_on_all_ranks("looking at the backbone"):
        check_backbone(b.path)
    # Partitioned loading consists of collectives, which a rank that fails would leave the others in.
    with (
        partitioned_loading(stage, config.parallelism.precision),
        raise_on_all_ranks("loading the backbone") if stage < 3 else nullcontext(),
    ):
        backbone = load_backbone(
            b.path,
            b.task,
            config.parallelism.precision,
            labels=config.data.labels,
            attention=b.attention,
            pad_token_id=pad_token_id,
        )
    if stage < 3:
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
    """The PEFT config of a new adapter."""
    values = {name: value for name, value in vars(config.adapter).items() if name != "init_from"}
    task_type = "CAUSAL_LM" if config.backbone.task == "causal_lm" else "SEQ_CLS"
    return LdMoleConfig(task_type=task_type, init_seed=config.run.seed, **values)
