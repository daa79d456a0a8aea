"""Reading and writing what an optimizer keeps of a parameter, by name, at every ZeRO stage.

What DeepSpeed 0.19.8 offers is right only with the precautions noted at each place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.build import Engine

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def read_states(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter name, kind, tensor) of every trainable parameter: "master" and its Adam moments, as held here.

    Every rank iterates over all of it. Banks give the experts held here, (L, ...); all other parameters are whole.
    """
    _link(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for kind in (MASTER, *MOMENTS):
                yield name, kind, _read(engine, parameter, None if kind == MASTER else kind)


def write_states(engine: Engine, states: dict[tuple[str, str], Tensor], step: int) -> None:
    """Set what `read_states` gave, on a fresh engine; every rank calls it.

    Args:
        engine: that has not stepped yet.
        states: (parameter name, kind) -> tensor, as held here.
        step: Adam's step count.
    """
    _create_moments(engine, step)
    _link(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for kind in (MASTER, *MOMENTS):
                _write(engine, parameter, None if kind == MASTER else kind, states[name, kind])
    _refresh_parameters(engine)


def _inner(engine: Engine) -> Any:
    optimizer = engine.deepspeed.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def _link(engine: Engine) -> None:
    if engine.stage in (1, 2):
        # DeepSpeed links the moments to parameters once, when its first group has stepped: later groups stay unlinked.
        optimizer = engine.deepspeed.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _read(engine: Engine, parameter: Any, moment: str | None) -> Tensor:
    if engine.stage == 3:
        value = parameter._z3_optimizer.get_full_hp_param(parameter, moment)
    elif engine.stage in (1, 2):
        value = parameter.get_full_hp_param(moment)
    else:
        value = parameter if moment is None else _inner(engine).state[parameter][moment]
    return value.detach().to("cpu", copy=True)


def _write(engine: Engine, parameter: Any, moment: str | None, value: Tensor) -> None:
    if engine.stage == 3:
        # DeepSpeed's own setter forgets that the last rank's piece is padded.
        piece, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, False, moment)
        group = parameter.ds_process_group
        flat = torch.zeros(piece.numel() * dist.get_world_size(group))
        flat[: value.numel()] = value.flatten()
        start = dist.get_rank(group) * piece.numel()
        piece.data.copy_(flat[start : start + piece.numel()])
    elif engine.stage in (1, 2):
        parameter.set_full_hp_param(value.to(parameter.device), moment)
    elif moment is None:
        parameter.data.copy_(value)
    else:
        _inner(engine).state[parameter][moment].copy_(value)


def _create_moments(engine: Engine, step: int) -> None:
    """Adam makes its moments at its first step; a resumed one needs them before."""
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
            state.setdefault(moment, torch.zeros_like(holder.data))
        # A tensor of its own for each: DeepSpeed shares one between sub-groups at stage 3, and it is counted several times.
        state["step"] = torch.tensor(float(step))
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = step


def _refresh_parameters(engine: Engine) -> None:
    """The parameters that the forward uses follow their masters."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        optimizer.update_lp_params()
    if engine.stage == 3:
        for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            flat = optimizer.fp16_partitioned_groups_flat[i]
            flat.data.copy_(master.data)
            pieces = optimizer.fp16_partitioned_groups[i]
            for piece, fresh in zip(pieces, optimizer.unflatten(flat, pieces), strict=True):
                piece.data = fresh.data
        persistent = optimizer.persistent_parameters
        if len(persistent) > 0:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
