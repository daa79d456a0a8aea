"""This rank's shards of the optimizer state, as flat ranges of each parameter, at every ZeRO stage.

ZeRO stages 1 to 3 split the float32 master weights and Adam moments of a parameter over the ranks that hold the parameter; at
stage 0, each of these ranks holds the full tensors. Each shard is one range of the flattened parameter; a bank of experts is
flattened as the (E, ...) tensor of all ranks. Each rank can therefore write its part of a checkpoint, and read a checkpoint
that was written under another split, without collectives.

The layout of the state and the workarounds noted below are those of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.build import Engine
from ldmole_dist.tuner.state_dict import is_expert_tensor

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerShard(NamedTuple):
    """Optimizer state that this rank holds for one parameter.

    Args:
        name: name of the parameter.
        shape: shape of the full parameter, with all experts.
        start: offset of the shard in the flattened full parameter.
        states: master weights ("master") and Adam moments (`MOMENTS`) of the shard, as flat views that can be written to.
        copy: index of this rank among the ranks that hold the same shard; above 0 only at ZeRO stage 0.
        copies: number of ranks that hold the same shard; 1 at ZeRO stages 1 to 3.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    states: dict[str, Tensor]
    copy: int
    copies: int

    def without_copies(self) -> OptimizerShard:
        """Return the part of the shard that this rank writes, so that ranks with the same shard write each element once."""
        number = len(self.states[MASTER])
        first, last = number * self.copy // self.copies, number * (self.copy + 1) // self.copies
        states = {kind: value[first:last] for kind, value in self.states.items()}
        return self._replace(start=self.start + first, states=states)


def full_shapes(engine: Engine, frozen_experts: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the full shape, with all experts, of every trainable parameter, by its name.

    Args:
        engine: engine of the model.
        frozen_experts: include experts that are not trained.
    """
    shapes = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad or (frozen_experts and is_expert_tensor(name)):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            shapes[name] = (shape[0] * engine.parallel.size, *shape[1:]) if is_expert_tensor(name) else shape
    return shapes


def optimizer_shards(engine: Engine) -> Iterator[OptimizerShard]:
    """Yield this rank's shard of each trainable parameter.

    At ZeRO stages 1 to 3, a rank may hold no shard of a parameter, which is then skipped. The Adam moments must exist: before
    the first step, call `create_moments`.
    """
    if engine.stage in (1, 2):
        # DeepSpeed links moments to parameters only once, after the step of the first parameter group. The moments of later
        # groups then stay unlinked, so link them again.
        optimizer = engine.deepspeed.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    shapes, parallel = full_shapes(engine), engine.parallel
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        start, states = _held(engine, parameter)
        copy, copies = (rank, world_size) if engine.stage == 0 else (0, 1)
        if is_expert_tensor(name):
            start += math.prod(shapes[name]) // parallel.size * (rank % parallel.size)
            copy, copies = copy // parallel.size, max(copies // parallel.size, 1)
        if states:
            detached = {kind: value.detach() for kind, value in states.items()}
            yield OptimizerShard(name, shapes[name], start, detached, copy, copies)


def _held(engine: Engine, parameter: Any) -> tuple[int, dict[str, Tensor]]:
    """Return this rank's shard of a parameter: its offset and its state, which is empty if this rank holds none.

    The offset is in the flattened parameter, which has only this rank's experts if it is an expert parameter.
    """
    kinds: dict[str, str | None] = {MASTER: None} | {moment: moment for moment in MOMENTS}
    if engine.stage == 3:
        first = 0
        states = {}
        for kind, key in kinds.items():
            partition, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, False, key)
            first = dist.get_rank(parameter.ds_process_group) * partition.numel()
            states[kind] = partition[: max(parameter.ds_numel - first, 0)]  # the last partition has padding
        return first, states if len(states[MASTER]) else {}
    if engine.stage in (1, 2):
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, {}
        return mapping.lp_fragment_address.start, {kind: mapping.get_hp_fragment(key) for kind, key in kinds.items()}
    state = _torch_optimizer(engine).state[parameter]
    # Not reshape(), which returns a copy where a flat view is impossible: writes to the copy would be lost. view() raises.
    return 0, {MASTER: parameter.data.view(-1)} | {moment: state[moment].view(-1) for moment in MOMENTS}


def create_moments(engine: Engine, step: int | None = None) -> None:
    """Create the Adam moments that do not exist yet, so that they can be saved or loaded before the first step.

    Args:
        engine: engine whose optimizer gets the moments.
        step: step count of Adam to set; None keeps the current count, or sets 0 if there is none.
    """
    inner, optimizer = _torch_optimizer(engine), engine.deepspeed.optimizer
    flat_masters = {
        1: "single_partition_of_fp32_groups",
        2: "single_partition_of_fp32_groups",
        3: "fp32_partitioned_groups_flat",
    }
    if engine.stage == 0:
        masters = [p for group in inner.param_groups for p in group["params"]]
    else:
        masters = getattr(optimizer, flat_masters[engine.stage])
    for master in masters:
        state = inner.state[master]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(master.data)
        if step is not None or "step" not in state:
            # Use one tensor per master: at stage 3, DeepSpeed shares one between sub-groups, and each would increment it.
            state["step"] = torch.tensor(float(step or 0))
    for group in inner.param_groups:
        if "step" in group and step is not None:
            group["step"] = step


def refresh_parameters(engine: Engine) -> None:
    """Copy the master weights to the parameters that the forward uses.

    Call it after writing to the shards of `optimizer_shards`. Collective: every rank must call it.
    """
    optimizer = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        optimizer.update_lp_params()
    if engine.stage == 3:
        for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            flat = optimizer.fp16_partitioned_groups_flat[i]
            flat.data.copy_(master.data)
            partitions = optimizer.fp16_partitioned_groups[i]
            for partition, updated in zip(partitions, optimizer.unflatten(flat, partitions), strict=True):
                partition.data = updated.data
        # Stage 3 keeps small parameters gathered on every rank; those full copies are stale now.
        persistent = optimizer.persistent_parameters
        if len(persistent) > 0:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _torch_optimizer(engine: Engine) -> Any:
    """Return the optimizer that DeepSpeed's ZeRO optimizer wraps, or at stage 0 the optimizer of the engine itself."""
    optimizer = engine.deepspeed.optimizer
    return getattr(optimizer, "optimizer", optimizer)
