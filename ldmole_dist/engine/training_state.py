"""State of a DeepSpeed engine: values that a checkpoint stores, and tensors that this rank holds.

Modules outside engine/ use these functions and `optimizer_state` instead of DeepSpeed's attributes, which change between
versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ldmole_dist.engine.build import Engine
from ldmole_dist.tuner.model import tuner_of

# Attributes of the DeepSpeed engine that a checkpoint stores.
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def training_state(engine: Engine, step: int) -> dict[str, Any]:
    """Return the counters, schedule position, loss scale, L1 coefficient and Adam step count of an engine, as JSON values.

    Args:
        engine: engine between two optimizer steps.
        step: number of optimizer steps of the run so far, including skipped ones.
    """
    deepspeed = engine.deepspeed
    scaler = getattr(deepspeed.optimizer, "loss_scaler", None)
    return {
        "adam_step": step - deepspeed.skipped_steps,
        "l1_coef": tuner_of(engine.module).context.weights.l1,
        "counters": {name: getattr(deepspeed, name) for name in COUNTERS},
        "scheduler": {"last_epoch": deepspeed.lr_scheduler.last_epoch},
        "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler else {},
    }


def restore_training_state(engine: Engine, state: dict[str, Any], step: int) -> None:
    """Restore a saved state in a new engine.

    The step count of Adam is not restored here: `optimizer_state.create_moments` sets it.

    Args:
        engine: engine that has not stepped yet, with any ZeRO stage, ep_size and world size.
        state: return value of `training_state`.
        step: value of `step` when the state was saved.
    """
    deepspeed = engine.deepspeed
    if "l1_coef" in state:  # checkpoints of version 0.1.0 may lack it
        tuner_of(engine.module).context.weights.l1 = state["l1_coef"]
    for name, value in state["counters"].items():
        setattr(deepspeed, name, value)
    deepspeed.micro_steps = step * deepspeed.gradient_accumulation_steps()
    # Do not load the scheduler's state_dict: it lists parameter groups, which depend on the ZeRO stage. The config determines
    # the learning rates.
    scheduler = deepspeed.lr_scheduler
    scheduler.last_epoch = state["scheduler"]["last_epoch"]
    for group, base, factor in zip(
        deepspeed.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(scheduler.last_epoch)
    # A run in another precision or with a fixed loss scale also saves the state of a scaler, which must not be restored here.
    scaler = getattr(deepspeed.optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic and state["loss_scaler"].get("dynamic"):
        vars(scaler).update(state["loss_scaler"])


def element_count(parameter: Any) -> int:
    """Return the number of elements of a parameter before ZeRO-3 partitions it; `numel()` is 0 once it is partitioned.

    For an expert parameter, only the experts of this rank count.
    """
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def local_shard(parameter: Any) -> Tensor:
    """Return this rank's shard of a parameter under ZeRO-3, else the parameter itself."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)
    return shard


def held_parameters(engine: Engine) -> Iterator[Tensor]:
    """Yield the tensors in which this rank stores parameters, frozen ones included."""
    for parameter in engine.module.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor.data


def held_gradients(engine: Engine) -> Iterator[Tensor]:
    """Yield the tensors in which this rank stores gradients between two micro-batches."""
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            yield parameter.grad
    optimizer = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        yield from tensors_in([optimizer.averaged_gradients, optimizer.all_grad_tensors])
        yield from tensors_in([p.grad for p in optimizer.single_partition_of_fp32_groups])
    if engine.stage == 3:
        yield optimizer.grad_partitions_flat_buffer
        yield from tensors_in([p.grad for p in optimizer.fp32_partitioned_groups_flat])


def held_optimizer_state(engine: Engine) -> Iterator[Tensor]:
    """Yield this rank's tensors of optimizer state: moments, step counts and, at ZeRO stages 1 to 3, master weights."""
    optimizer = engine.deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    yield from tensors_in([dict(state) for state in inner.state.values()])
    if engine.stage in (1, 2):
        yield from optimizer.single_partition_of_fp32_groups
    if engine.stage == 3:
        yield from optimizer.fp32_partitioned_groups_flat


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
