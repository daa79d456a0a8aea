"""Choosing the checkpoint that a run goes on from, and going on under any ZeRO stage, ep_size and number of ranks.

Every rank reads, of every parameter, just the stretch that it keeps.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ldmole_dist.checkpoint.files import Stretches
from ldmole_dist.checkpoint.manifest import NAME, Manifest, content_problems, file_problems, fingerprint, read_manifest
from ldmole_dist.checkpoint.save import topology
from ldmole_dist.config import Adapter, Config
from ldmole_dist.distributed import Process, from_main, raise_on_all_ranks
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.optimizer_state import create_moments, full_shapes, optimizer_shards, refresh_parameters
from ldmole_dist.engine.training_state import restore_training_state
from ldmole_dist.errors import UserError


def choose_checkpoint(config: Config, data: dict[str, int | str], process: Process) -> Path | None:
    """The checkpoint to go on from, verified, or None to start anew; every rank calls it.

    Args:
        config: of the run; `run.resume` says how.
        data: what the order of its examples depends on (`data.batches.describe_order`).
        process: of this rank. Each verifies its share of the files.

    Raises:
        UserError, PeerError: where the one asked for is not whole, or none of those that are there, or it is of another
            adapter, backbone or data.
    """
    resume = config.run.resume
    if resume == "never":
        return None
    with raise_on_all_ranks("looking for checkpoints"):
        found = own = newest(Path(config.run.output_dir))
        if resume != "auto" and not (own and _began_with(own[0], resume)):
            found = _asked_for(Path(resume))
    candidates = from_main(found)  # a network file system may show the others an older folder
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
            tqdm.write(f"checkpoint {candidate} is not whole, looking for an older one: {problems[0]}")
    if candidates:
        with raise_on_all_ranks("choosing a checkpoint"):
            raise UserError(
                f"no checkpoint to go on from is whole: {problems[0]}; restore it, or set run.resume to another one or "
                "to never"
            )
    return None


def load_checkpoint(engine: Engine, checkpoint: Path, process: Process) -> int:
    """Put a fresh engine into the state that was saved; every rank calls it.

    Args:
        engine: of the same backbone and adapter, under any topology, that has not stepped yet.
        checkpoint: that `choose_checkpoint` gave.
        process: of this rank.

    Returns:
        Optimizer steps done.

    Raises:
        UserError, PeerError: where its parameters are not those of the engine.
    """
    with raise_on_all_ranks(f"reading checkpoint {checkpoint}"):
        manifest = read_manifest(checkpoint)
        _check_shapes(manifest, checkpoint, full_shapes(engine))
        create_moments(engine, step=manifest.training["adam_step"])
        with Stretches(checkpoint / name for name in manifest.rank_files()) as stretches:
            for shard in optimizer_shards(engine):
                for kind, held in shard.states.items():
                    key, end = f"{kind}/{shard.name}", shard.start + len(held)
                    for position, value in stretches.read(key, shard.start, end):
                        held[position : position + len(value)].copy_(value)
    refresh_parameters(engine)
    restore_training_state(engine, manifest.training, manifest.step)
    if manifest.topology == topology(engine, process):
        _restore_random_states(checkpoint / manifest.rank_files()[process.rank], process.device)
    elif process.is_main:
        tqdm.write(f"{checkpoint} was written with {manifest.topology}, this run has {topology(engine, process)}")
    return manifest.step


def newest(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first."""
    return sorted((run / "checkpoints").glob("step_*"), reverse=True)


def _asked_for(path: Path) -> list[Path]:
    if (path / NAME).exists():
        return [path]
    if found := newest(path):
        return found[:1]
    raise UserError(
        f"run.resume={str(path)!r} is neither a checkpoint (it has no {NAME}) nor a run with checkpoints; give one of them, "
        "auto or never"
    )


def _began_with(checkpoint: Path, resume: str) -> bool:
    """Whether the run that wrote a checkpoint had been told to go on from the same place: started again, it goes on with its
    own."""
    try:
        return bool(read_manifest(checkpoint).config["run"]["resume"] == resume)
    except UserError:
        return False


def _problems(checkpoint: Path, process: Process) -> list[str]:
    """What is wrong with it, the same on every rank; each reads its share of the files."""
    own: list[str] = []
    try:
        manifest = read_manifest(checkpoint)
        own = file_problems(checkpoint, manifest, manifest.all_files()[process.rank :: process.world_size])
    except UserError as error:
        own = [str(error)]
    every: list[list[str]] = [own]
    if process.world_size > 1:
        every = [[] for _ in range(process.world_size)]
        dist.all_gather_object(every, own)
    problems = [problem for of_rank in every for problem in of_rank]
    if not problems and process.is_main:
        try:
            problems = content_problems(checkpoint, manifest)
        except UserError as error:
            problems = [str(error)]
    return from_main(problems)


def _check_fits(manifest: Manifest, checkpoint: Path, config: Config, data: dict[str, int | str]) -> None:
    saved = manifest.config
    # With the default of each key that there was not yet when the checkpoint was written.
    adapter = asdict(Adapter()) | saved["adapter"]
    for key in ("router", "top_k", "top_p", "num_experts", "r", "lambda_hidden", "target_modules"):
        was, now = adapter[key], getattr(config.adapter, key)
        if was != now:
            raise UserError(
                f"{checkpoint} is of an adapter with adapter.{key}={was}, this run has {now}: set it as it was, or "
                "run.resume=never"
            )
    found, here = manifest.backbone["fingerprint"], fingerprint(config.backbone.path)
    if found and here and found != here:
        raise UserError(
            f"{checkpoint} is of another backbone, {manifest.backbone['path']}: the weights of {config.backbone.path} differ; "
            "give that backbone, or set run.resume=never"
        )
    for key, value in data.items():
        if manifest.data.get(key) != value:
            raise UserError(
                f"{checkpoint} was trained on data with {key}={manifest.data.get(key)}, this run has {value}: the order of the "
                "examples would not go on; set it as it was, or start from its adapter "
                f"(ldmole checkpoint export {checkpoint} ADAPTER, then adapter.init_from=ADAPTER and run.resume=never)"
            )


def _check_shapes(manifest: Manifest, checkpoint: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    saved = {name: tuple(shape) for name, shape in manifest.shapes.items()}
    for name in sorted(saved.keys() | shapes.keys()):
        if saved.get(name) != shapes.get(name):
            raise UserError(
                f"{checkpoint} is of another backbone, {manifest.backbone['path']}: {name} is "
                f"{saved.get(name, 'not there')} there and {shapes.get(name, 'not there')} here; give that backbone, or set "
                "run.resume=never"
            )


def _restore_random_states(path: Path, device: torch.device) -> None:
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith("random/")]  # noqa: SIM118  (not a dictionary)
        states: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    torch.set_rng_state(states["random/cpu"])
    if device.type == "cuda" and "random/cuda" in states:  # not if it was written on a CPU
        torch.cuda.set_rng_state(states["random/cuda"], device)
