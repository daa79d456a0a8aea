"""What an optimizer keeps on this rank of every parameter, as stretches of the whole parameter, at every ZeRO stage.

ZeRO cuts the float32 masters and Adam moments of a parameter into pieces over the ranks that hold it. Every piece is a
stretch of the flattened whole, a bank of experts being the [E, ...] of all ranks. So a checkpoint can be written by each rank
on its own and read under any other cutting (`checkpoint`), and no collective is needed for either.

What DeepSpeed 0.19.8 offers is right only with the precautions noted at each place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.build import Engine
from ldmole_dist.tuner.model import is_expert_tensor

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """What this rank keeps of one parameter.

    Args:
        name: of the parameter.
        shape: of the whole parameter, all experts included.
        start: where the piece begins in the flattened whole.
        states: "master" and the Adam moments, flat views that can be written.
        copy: which of `copies` equal ones this is, held by other ranks too (stage 0).
        copies: how many there are.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    states: dict[str, Tensor]
    copy: int
    copies: int

    def share(self) -> Piece:
        """The part of it that this rank writes, where several hold the same."""
        number = len(self.states[MASTER])
        first, last = number * self.copy // self.copies, number * (self.copy + 1) // self.copies
        states = {kind: value[first:last] for kind, value in self.states.items()}
        return self._replace(start=self.start + first, states=states)


def whole_shapes(engine: Engine, frozen_experts: bool = False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trainable parameter, all experts included.

    Args:
        engine: with the model.
        frozen_experts: of experts that are not trained, too.
    """
    shapes = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad or (frozen_experts and is_expert_tensor(name)):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            shapes[name] = (shape[0] * engine.parallel.size, *shape[1:]) if is_expert_tensor(name) else shape
    return shapes


def pieces(engine: Engine) -> Iterator[Piece]:
    """What this rank keeps of every trainable parameter; nothing of some under ZeRO 1 to 3.

    The engine must have made its Adam moments (`make_moments`).
    """
    if engine.stage in (1, 2):
        # DeepSpeed links the moments to parameters once, when its first group has stepped: later groups stay unlinked.
        optimizer = engine.deepspeed.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    shapes, parallel = whole_shapes(engine), engine.parallel
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
            yield Piece(name, shapes[name], start, {kind: v.detach() for kind, v in states.items()}, copy, copies)


def _held(engine: Engine, parameter: Any) -> tuple[int, dict[str, Tensor]]:
    """Where what this rank keeps begins in the flattened parameter (of a bank: of the experts held here), and what it is."""
    kinds: dict[str, str | None] = {MASTER: None} | {moment: moment for moment in MOMENTS}
    if engine.stage == 3:
        first = 0
        states = {}
        for kind, key in kinds.items():
            piece, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, False, key)
            first = dist.get_rank(parameter.ds_process_group) * piece.numel()
            states[kind] = piece[: max(parameter.ds_numel - first, 0)]  # the last piece is padded
        return first, states if len(states[MASTER]) else {}
    if engine.stage in (1, 2):
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, {}
        return mapping.lp_fragment_address.start, {kind: mapping.get_hp_fragment(key) for kind, key in kinds.items()}
    state = _inner(engine).state[parameter]
    # Views: of a tensor that cannot be seen flat this is an error, not a copy that nobody reads.
    return 0, {MASTER: parameter.data.view(-1)} | {moment: state[moment].view(-1) for moment in MOMENTS}


def make_moments(engine: Engine, step: int | None = None) -> None:
    """Adam makes its moments at its first step; who reads or writes them earlier needs them before.

    Args:
        engine: whose moments are made where there are none.
        step: Adam's step count, to be set; None leaves it, 0 where there is none.
    """
    inner, optimizer = _inner(engine), engine.deepspeed.optimizer
    flats = {
        1: "single_partition_of_fp32_groups",
        2: "single_partition_of_fp32_groups",
        3: "fp32_partitioned_groups_flat",
    }
    if engine.stage == 0:
        holders = [p for group in inner.param_groups for p in group["params"]]
    else:
        holders = getattr(optimizer, flats[engine.stage])
    for holder in holders:
        state = inner.state[holder]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(holder.data)
        if step is not None or "step" not in state:
            # A tensor of its own for each: DeepSpeed shares one between sub-groups at stage 3, and it is counted several times.
            state["step"] = torch.tensor(float(step or 0))
    for group in inner.param_groups:
        if "step" in group and step is not None:
            group["step"] = step


def refresh_parameters(engine: Engine) -> None:
    """The parameters that the forward uses follow their masters; every rank calls it after writing into `pieces`."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        optimizer.update_lp_params()
    if engine.stage == 3:
        for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            flat = optimizer.fp16_partitioned_groups_flat[i]
            flat.data.copy_(master.data)
            partitions = optimizer.fp16_partitioned_groups[i]
            for piece, fresh in zip(partitions, optimizer.unflatten(flat, partitions), strict=True):
                piece.data = fresh.data
        persistent = optimizer.persistent_parameters
        if len(persistent) > 0:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _inner(engine: Engine) -> Any:
    optimizer = engine.deepspeed.optimizer
    return getattr(optimizer, "optimizer", optimizer)
