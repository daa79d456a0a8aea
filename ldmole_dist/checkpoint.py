"""Resuming a run exactly, and exporting the portable adapter.

A checkpoint is a folder `checkpoints/step_N`: `rank_R.safetensors` of every rank (masters and Adam moments by parameter
name, a bank's experts by the ranks of the first expert-parallel group, everything else by rank 0; random states by all)
and `state.json`. It is written under another name and renamed when whole; `latest` names the newest and is replaced last.
A checkpoint is read by the same ZeRO stage, ep_size and number of ranks that wrote it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.masters import read_states, write_states
from ldmole_dist.engine.startup import Process, agreed
from ldmole_dist.errors import UserError
from ldmole_dist.peft_method import is_expert_tensor

FORMAT_VERSION = 1


def save_checkpoint(engine: Engine, folder: Path, step: int, process: Process, keep_last: int) -> None:
    """Write the state after `step` optimizer steps; every rank calls it.

    Args:
        engine: between two optimizer steps.
        folder: `checkpoints` of the run.
        step: optimizer steps done.
        process: of this rank.
        keep_last: older checkpoints beyond so many are removed.
    """
    final = folder / f"step_{step:08d}"
    unfinished = folder / f".{final.name}"
    with agreed("preparing the checkpoint folder"):
        if process.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    ep_size = engine.parallel.size
    tensors = _random_states(process.device)
    for name, kind, value in read_states(engine):
        if process.rank < ep_size if is_expert_tensor(name) else process.is_main:
            tensors[f"{kind}/{name}"] = value
    with agreed("writing the checkpoint"):
        save_file(tensors, unfinished / f"rank_{process.rank:05d}.safetensors")
        if process.is_main:
            (unfinished / "state.json").write_text(json.dumps(_state(engine, step, process)))
    with agreed("finishing the checkpoint"):
        if process.is_main:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            pending = folder / ".latest"
            pending.write_text(final.name)
            os.replace(pending, folder / "latest")
            for old in sorted(folder.glob("step_*"))[:-keep_last]:
                shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a `checkpoints` folder, or None."""
    pointer = folder / "latest"
    return folder / pointer.read_text().strip() if pointer.exists() else None


def load_checkpoint(engine: Engine, checkpoint: Path, process: Process) -> int:
    """Put a fresh engine into the state that was saved; every rank calls it.

    Args:
        engine: of the same model and topology, that has not stepped yet.
        checkpoint: folder that `save_checkpoint` wrote.
        process: of this rank.

    Returns:
        Optimizer steps done.

    Raises:
        UserError: where it was written by another topology or a newer version, or a file is missing.
    """
    with agreed(f"reading checkpoint {checkpoint}"):
        state = _read_state(checkpoint, engine, process)
        own = _read_tensors(checkpoint / f"rank_{process.rank:05d}.safetensors", "random/")
        states = _read_tensors(checkpoint / "rank_00000.safetensors", "", experts=False)
        expert_rank = process.rank % engine.parallel.size
        states |= _read_tensors(checkpoint / f"rank_{expert_rank:05d}.safetensors", "", experts=True)
        by_name = {}
        for key, value in states.items():
            kind, _, name = key.partition("/")
            by_name[name, kind] = value
        missing = [n for n, p in engine.module.named_parameters() if p.requires_grad and (n, "master") not in by_name]
        if missing:
            raise UserError(f"checkpoint {checkpoint} has no {missing[0]}: it is of another adapter or backbone")
    write_states(engine, by_name, state["adam_step"])
    deepspeed = engine.deepspeed
    for name, value in state["counters"].items():
        setattr(deepspeed, name, value)
    deepspeed.lr_scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(deepspeed.optimizer.param_groups, state["learning_rates"], strict=True):
        group["lr"] = rate
    if state["loss_scaler"] is not None:
        vars(deepspeed.optimizer.loss_scaler).update(state["loss_scaler"])
    _restore_random_states(own, process.device)
    return int(state["step"])


def export_adapter(engine: Engine, folder: Path, process: Process) -> None:
    """Write the portable adapter, all experts in it, loadable by `PeftModel.from_pretrained`; every rank calls it."""
    engine.module.save_pretrained(str(folder), is_main_process=process.is_main)


COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def _topology(engine: Engine, process: Process) -> dict[str, int]:
    return {"zero_stage": engine.stage, "ep_size": engine.parallel.size, "world_size": process.world_size}


def _state(engine: Engine, step: int, process: Process) -> dict[str, Any]:
    deepspeed = engine.deepspeed
    scaler = getattr(deepspeed.optimizer, "loss_scaler", None)
    return {
        "format_version": FORMAT_VERSION,
        "topology": _topology(engine, process),
        "step": step,
        "adam_step": step - deepspeed.skipped_steps,
        "counters": {name: getattr(deepspeed, name) for name in COUNTERS},
        "scheduler": deepspeed.lr_scheduler.state_dict(),
        "learning_rates": [group["lr"] for group in deepspeed.optimizer.param_groups],
        "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler else None,
    }


def _read_state(checkpoint: Path, engine: Engine, process: Process) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be read: {error}; remove it or set run.resume=never"
        ) from error
    if state["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {checkpoint} is of format {state['format_version']}, newer than {FORMAT_VERSION}: upgrade"
        )
    if state["topology"] != _topology(engine, process):
        raise UserError(
            f"checkpoint {checkpoint} was written with {state['topology']}, this run has {_topology(engine, process)}: "
            "start it as it was, or start anew from the exported adapter (adapter.init_from)"
        )
    return state


def _read_tensors(path: Path, prefix: str, experts: bool | None = None) -> dict[str, Tensor]:
    """Tensors of a rank's file, by prefix, and random states apart from the banks of experts and everything else."""
    try:
        with safe_open(path, "pt") as file:
            return {
                key: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118  (not a dictionary)
                if key.startswith(prefix)
                and (experts is None or (not key.startswith("random/") and is_expert_tensor(key) == experts))
            }
    except Exception as error:
        raise UserError(
            f"checkpoint file {path} cannot be read: {error}; set run.resume=never to start anew"
        ) from error


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["random/cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["random/cuda"], device)
