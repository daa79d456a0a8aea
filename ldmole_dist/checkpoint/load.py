"""Choose the checkpoint to resume from, and load it under any ZeRO stage, ep_size and number of ranks.

Each rank reads only the ranges of the optimizer state that it will hold.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ldmole_dist.checkpoint.files import ShardReader
from ldmole_dist.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    content_problems,
    file_problems,
    fingerprint,
    read_manifest,
)
from ldmole_dist.checkpoint.save import topology
from ldmole_dist.config import Adapter, Config
from ldmole_dist.distributed import Process, broadcast_from_main, raise_on_all_ranks
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.optimizer_state import create_moments, full_shapes, optimizer_shards, refresh_parameters
from ldmole_dist.engine.training_state import restore_training_state
from ldmole_dist.errors import UserError
from ldmole_dist.tuner.state_dict import adapter_keys


def choose_checkpoint(config: Config, data: dict[str, int | str], process: Process) -> Path | None:
    """Choose and verify the checkpoint to resume from. Collective: every rank must call it.

    With run.resume="auto", the result is the latest intact checkpoint in the output folder. With a path, the only candidate is
    the checkpoint at the path, or the latest one of the run at the path. If the output folder's latest checkpoint is from a run
    with the same `run.resume`, then that checkpoint is the only candidate instead, so that a restarted job keeps its progress.

    Args:
        config: config of the run; `run.resume` selects the checkpoint.
        data: values that determine the order of the examples (`data.batches.describe_order`).
        process: this rank, which verifies its share of the files.

    Returns:
        The checkpoint, the same on every rank; None to start fresh, which "auto" does only if the output folder has none.

    Raises:
        UserError, PeerError: if the path in `run.resume` is neither a checkpoint nor a run with checkpoints; if there are
            candidates but none is intact; or if the chosen checkpoint was trained with another adapter, backbone or order of
            the examples.
    """
    resume = config.run.resume
    if resume == "never":
        return None
    with raise_on_all_ranks("looking for checkpoints"):
        candidates = own = list_checkpoints(Path(config.run.output_dir))
        if resume != "auto" and not (own and _resumed_from(own[0], resume)):
            candidates = _requested_checkpoint(Path(resume))
    candidates = broadcast_from_main(candidates)  # a network file system may show other ranks an outdated folder
    problems: list[str] = []
    for candidate in candidates:
        problems = _problems(candidate, process)
        if not problems:
            with raise_on_all_ranks(f"comparing checkpoint {candidate} with this run"):
                _check_fits(read_manifest(candidate), candidate, config, data)
            return candidate
        if resume != "auto":
            break
        if process.is_main:
            tqdm.write(f"skipped checkpoint {candidate.name}: {problems[0]}")
    if candidates:
        with raise_on_all_ranks("choosing a checkpoint"):
            raise UserError(
                f"no usable checkpoint to resume from: {problems[0]}. Set run.resume to another checkpoint, or to never to "
                "start fresh."
            )
    return None


def load_checkpoint(engine: Engine, checkpoint: Path, process: Process) -> int:
    """Load a checkpoint into a new engine. Collective: every rank must call it.

    Random states are restored only if the topology is that of the run that wrote the checkpoint.

    Args:
        engine: engine with the backbone and adapter config of the checkpoint, under any topology, before its first step.
        checkpoint: return value of `choose_checkpoint`.
        process: this rank.

    Returns:
        Number of optimizer steps after which the checkpoint was saved.

    Raises:
        UserError, PeerError: if the checkpoint cannot be read, or its parameters differ from those of the engine.
    """
    with raise_on_all_ranks(f"reading checkpoint {checkpoint}"):
        manifest = read_manifest(checkpoint)
        names = _saved_names(manifest, adapter_keys(engine.module))
        _check_shapes(manifest, checkpoint, {names[name]: shape for name, shape in full_shapes(engine).items()})
        create_moments(engine, step=manifest.training["adam_step"])
        with ShardReader(checkpoint / name for name in manifest.rank_files()) as reader:
            for shard in optimizer_shards(engine):
                for state, held in shard.states.items():
                    key, end = f"{state}/{names[shard.name]}", shard.start + len(held)
                    for position, value in reader.read_range(key, shard.start, end):
                        held[position : position + len(value)].copy_(value)
    refresh_parameters(engine)
    restore_training_state(engine, manifest.training, manifest.step)
    here = topology(engine, process)
    if manifest.topology == here:
        _restore_random_states(checkpoint / manifest.rank_files()[process.rank], process.device)
    elif process.is_main:
        tqdm.write(
            f"{checkpoint} was written with {_join(manifest.topology)}, but this run has {_join(here)}; random states are not "
            "restored"
        )
    return manifest.step


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, latest first."""
    return sorted((run / "checkpoints").glob("step_*"), reverse=True)


def _join(topology: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in topology.items())


def _requested_checkpoint(path: Path) -> list[Path]:
    """Return the checkpoint at `path`, or the latest one of the run at `path`, as a list with one entry.

    Raises:
        UserError: if `path` is neither a checkpoint nor a run with checkpoints.
    """
    if (path / MANIFEST_NAME).exists():
        return [path]
    if found := list_checkpoints(path):
        return found[:1]
    raise UserError(
        f"run.resume={str(path)!r} is neither a checkpoint (it has no {MANIFEST_NAME}) nor a run with checkpoints; set "
        "it to the path of one of these, to auto or to never"
    )


def _resumed_from(checkpoint: Path, resume: str) -> bool:
    """Return whether the run that wrote a checkpoint had `run.resume` set to `resume`.

    If so, this run is a restart of that run and must continue from its own checkpoint, not start over from `resume`. False if
    the manifest of the checkpoint cannot be read.
    """
    try:
        return bool(read_manifest(checkpoint).config["run"]["resume"] == resume)
    except UserError:
        return False


def _problems(checkpoint: Path, process: Process) -> list[str]:
    """Return the problems of a checkpoint; empty if it is intact.

    Collective: each rank hashes its share of the files, and all ranks return the same problems.
    """
    own: list[str] = []
    try:
        manifest = read_manifest(checkpoint)
        own = file_problems(checkpoint, manifest, manifest.required_files()[process.rank :: process.world_size])
    except UserError as error:
        own = [str(error)]
    by_rank: list[list[str]] = [own]
    if process.world_size > 1:
        by_rank = [[] for _ in range(process.world_size)]
        dist.all_gather_object(by_rank, own)
    problems = [problem for of_rank in by_rank for problem in of_rank]
    if not problems and process.is_main:
        try:
            problems = content_problems(checkpoint, manifest)
        except UserError as error:
            problems = [str(error)]
    return broadcast_from_main(problems)


def _check_fits(manifest: Manifest, checkpoint: Path, config: Config, data: dict[str, int | str]) -> None:
    """Raise UserError if an adapter key listed below, the backbone or the order of the examples differs from the checkpoint.

    Backbones are compared by `fingerprint`, and only if both have one.
    """
    # A checkpoint of an earlier version lacks the adapter keys that were added later. Their defaults describe its adapter.
    saved_adapter = asdict(Adapter()) | manifest.config["adapter"]
    for key in ("router", "top_k", "top_p", "num_experts", "r", "lambda_hidden", "target_modules", "target_parameters"):
        saved, here = saved_adapter[key], getattr(config.adapter, key)
        if saved != here:
            raise UserError(
                f"{checkpoint} was trained with adapter.{key}={saved}, but this run has {here}; set the same value, or "
                "run.resume=never"
            )
    saved_weights, weights = manifest.backbone["fingerprint"], fingerprint(config.backbone.path)
    if saved_weights and weights and saved_weights != weights:
        saved_path, path = manifest.backbone["path"], config.backbone.path
        if saved_path == path:
            raise UserError(
                f"the weights in backbone.path={path} differ from those that {checkpoint} was trained on; restore the original "
                "weights, or set run.resume=never"
            )
        raise UserError(
            f"{checkpoint} was trained on another backbone, {saved_path}, and the weights in {path} differ from it; set "
            f"backbone.path={saved_path}, or run.resume=never"
        )
    for key in manifest.data | data:  # "mixture" is missing in a run without source weights
        if (previous := manifest.data.get(key)) != (value := data.get(key)):
            setting = {"global_batch_size": "optimisation.global_batch_size", "seed": "run.seed"}.get(key)
            trained = f"with {setting}" if setting else f"on data with {key}"
            restore = (
                f'restore the data files and set the data section as under "config" in {checkpoint / MANIFEST_NAME}'
            )
            remedy = f"set {setting}={previous}" if setting else restore
            raise UserError(
                f"{checkpoint} was trained {trained}={previous}, but this run has {value}, which changes the order of the "
                f"examples; {remedy}, or start from the adapter of the checkpoint "
                f"(ldmole checkpoint export {checkpoint} ADAPTER, then adapter.init_from=ADAPTER and run.resume=never)"
            )


def _saved_names(manifest: Manifest, keys: dict[str, str]) -> dict[str, str]:
    """Return the name in a checkpoint of each parameter of the adapter, by its name in the model.

    The two differ if an earlier version wrote the checkpoint, because the names in its model were different. Keys in an adapter
    file are the same in all versions.

    Args:
        manifest: manifest of the checkpoint.
        keys: key of each parameter in an adapter file, by its name in the model.
    """
    saved = {key: name for name, key in manifest.adapter_keys.items()}
    return {name: saved.get(key, name) for name, key in keys.items()}


def _check_shapes(manifest: Manifest, checkpoint: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError if the names or shapes of the trainable parameters differ from those in a manifest."""
    saved = {name: tuple(shape) for name, shape in manifest.shapes.items()}
    for name in sorted(saved.keys() | shapes.keys()):
        if saved.get(name) != shapes.get(name):
            there, here = (f"of shape {list(s[name])}" if name in s else "missing" for s in (saved, shapes))
            raise UserError(
                f"{checkpoint} does not match the model of this run: {name} is {there} in the checkpoint and {here} in the "
                f"model; set backbone.path={manifest.backbone['path']}, and backbone.task, data.labels and the adapter section "
                f'as under "config" in {checkpoint / MANIFEST_NAME}; or set run.resume=never'
            )


def _restore_random_states(path: Path, device: torch.device) -> None:
    """Restore the random states of the CPU and, on a GPU, of the device from this rank's file of a checkpoint."""
    with safe_open(path, "pt") as file:
        # safe_open objects are not iterable.
        names = [name for name in file.keys() if name.startswith("random/")]  # noqa: SIM118
        states: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    torch.set_rng_state(states["random/cpu"])
    if device.type == "cuda" and "random/cuda" in states:  # absent if the checkpoint was written on a CPU
        torch.cuda.set_rng_state(states["random/cuda"], device)
