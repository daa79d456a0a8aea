"""Writing checkpoints while training goes on.

`Saver.save` takes note of the small things at once and starts a thread that copies this rank's pieces of the optimizer state to
host memory and writes them from there. Training goes on with the next forward; only the next optimizer step waits until the
copy is made (`before_update`). When every rank's file is on its disk, which the ranks learn at the end of some later step,
`finish` writes the manifest, gives the folder its name and points `latest` to it. A crash at any moment leaves the checkpoints
before untouched. Threads enter no collectives.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.checkpoint import manifest as manifests
from ldmole_dist.checkpoint.export import CONFIG_NAME, write_adapter_config
from ldmole_dist.checkpoint.files import Entry, write_tensors
from ldmole_dist.checkpoint.manifest import Manifest
from ldmole_dist.cluster.heartbeat import heartbeat
from ldmole_dist.config import Config, plain_config
from ldmole_dist.distributed import Process, raise_on_all_ranks
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.optimizer_state import OptimizerShard, create_moments, full_shapes, optimizer_shards
from ldmole_dist.engine.training_state import training_state
from ldmole_dist.io import (
    Digest,
    atomic_write,
    file_digest,
    publish_folder,
    start_folder,
    sync,
    unfinished_folder,
    write_errors,
)
from ldmole_dist.tuner.state_dict import adapter_keys


@dataclass
class _Writing:
    """A checkpoint that is being written by this rank."""

    step: int
    unfinished: Path
    manifest: Manifest
    thread: threading.Thread | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    digest: Digest | None = None
    error: Exception | None = None


class Saver:
    """Writes the checkpoints of a run; every rank has one and makes the same calls.

    Args:
        folder: `checkpoints` of the run.
        config: of the run.
        process: of this rank.
        data: what the order of the examples depends on (`data.batches.describe_order`).
    """

    def __init__(self, folder: Path, config: Config, process: Process, data: dict[str, int | str]) -> None:
        self.folder, self.config, self.process, self.data = folder, config, process, data
        self._writing: _Writing | None = None
        self._host: dict[str, Tensor] = {}  # the copies, kept from one checkpoint to the next

    def save(self, engine: Engine, step: int) -> None:
        """Begin a checkpoint of the state after `step` optimizer steps; one that is still being written is finished before.

        Raises:
            UserError: where the folder cannot be made, or with run.save_async=false where it cannot be written.
        """
        self.finish()
        heartbeat(f"saving after step {step}")
        create_moments(engine)
        final = self.folder / f"step_{step:08d}"
        unfinished = unfinished_folder(final)
        with raise_on_all_ranks("preparing the checkpoint"), write_errors(f"the checkpoint {unfinished}"):
            if self.process.is_main:
                # What a run that was cut off has left.
                for left in [*self.folder.glob(".step_*"), *self.folder.glob(".removed_*")]:
                    shutil.rmtree(left, ignore_errors=True)
                start_folder(final)
                write_adapter_config(engine.module, unfinished)
            held = [shard.without_copies() for shard in optimizer_shards(engine)]
            writing = _Writing(step, unfinished, self._manifest(engine, step))
        random = _random_states(self.process.device)
        self._writing = writing
        if not self.config.run.save_async:
            self._write(writing, held, random, None)
            self.finish()
            return
        ready = torch.cuda.Event() if self.process.device.type == "cuda" else None
        if ready is not None:
            ready.record()
        writing.thread = threading.Thread(target=self._write, args=(writing, held, random, ready), daemon=True)
        writing.thread.start()

    def before_update(self) -> None:
        """Wait until the copy is made: an optimizer step would change what is being copied."""
        if self._writing is not None:
            self._writing.copied.wait()

    @property
    def done(self) -> bool:
        """Whether this rank's file is written, or failed to be."""
        return self._writing is not None and (self._writing.thread is None or not self._writing.thread.is_alive())

    def finish(self) -> None:
        """Wait for every rank's file and make the checkpoint valid, if there is one under way.

        Raises:
            UserError: where it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        while writing.thread is not None and writing.thread.is_alive():
            heartbeat("writing a checkpoint")  # repeated, so that a long write does not count as a stall
            writing.thread.join(10)
        with raise_on_all_ranks("writing the checkpoint"), write_errors(f"the checkpoint {writing.unfinished}"):
            if writing.error is not None:
                raise writing.error
        digests: list[Any] = [None] * self.process.world_size
        dist.all_gather_object(digests, writing.digest)
        with raise_on_all_ranks("finishing the checkpoint"), write_errors(f"the checkpoint {writing.unfinished}"):
            if self.process.is_main:
                self._make_valid(writing, digests)

    def _make_valid(self, writing: _Writing, digests: list[Digest]) -> None:
        unfinished, final = writing.unfinished, self.folder / f"step_{writing.step:08d}"
        names = writing.manifest.rank_files()
        files = dict(zip(names, digests, strict=True))
        writing.manifest.files = files | {CONFIG_NAME: file_digest(unfinished / CONFIG_NAME)}
        atomic_write(unfinished / manifests.NAME, writing.manifest.text())
        if final.exists():  # the same step saved again
            self._remove(final)
        publish_folder(final)
        point_to(final)
        for old in sorted(self.folder.glob("step_*"))[: -self.config.run.keep_last]:
            self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        # What is half removed must not look like a checkpoint; large files take time, and training would wait for it.
        gone = checkpoint.rename(self.folder / f".removed_{checkpoint.name}_{time.time_ns()}")
        threading.Thread(target=shutil.rmtree, args=(gone,), kwargs={"ignore_errors": True}).start()

    def _write(
        self, writing: _Writing, held: list[OptimizerShard], random: dict[str, Tensor], ready: torch.cuda.Event | None
    ) -> None:
        try:
            states = {f"{kind}/{shard.name}": value for shard in held for kind, value in shard.states.items()}
            starts = {f"{kind}/{shard.name}": shard.start for shard in held for kind in shard.states}
            if self.config.run.save_async:
                states = self._copied(states, ready)
                writing.copied.set()
            tensors = states | random
            entries = [Entry(key, value.shape, value.dtype) for key, value in tensors.items()]
            path = writing.unfinished / f"rank_{self.process.rank:05d}.safetensors"
            writing.digest = write_tensors(path, entries, tensors.values(), {"starts": json.dumps(starts)})
            sync(writing.unfinished)
        except Exception as error:  # of any kind: `finish` raises it where it can be heard
            writing.error = error
        finally:
            writing.copied.set()

    def _copied(self, states: dict[str, Tensor], ready: torch.cuda.Event | None) -> dict[str, Tensor]:
        stream = None
        if ready is not None:
            torch.cuda.set_device(self.process.device)
            stream = torch.cuda.Stream()
            stream.wait_event(ready)
        with torch.cuda.stream(stream):
            for key, value in states.items():
                if key not in self._host or self._host[key].shape != value.shape:
                    self._host[key] = torch.empty_like(value, device="cpu", pin_memory=ready is not None)
                self._host[key].copy_(value, non_blocking=True)
        if stream is not None:
            stream.synchronize()
        return {key: self._host[key] for key in states}

    def _manifest(self, engine: Engine, step: int) -> Manifest:
        shapes = full_shapes(engine)
        keys = adapter_keys(engine.module)
        return Manifest(
            step=step,
            topology=topology(engine, self.process),
            shapes={name: list(shape) for name, shape in shapes.items()},
            adapter_keys={name: keys[name] for name in shapes},
            training=training_state(engine, step),
            data=self.data,
            backbone={
                "path": self.config.backbone.path,
                "fingerprint": manifests.fingerprint(self.config.backbone.path),
            },
            config=plain_config(self.config),
            files={},
        )


def topology(engine: Engine, process: Process) -> dict[str, int]:
    """How a run is spread."""
    return {"zero_stage": engine.stage, "ep_size": engine.parallel.size, "world_size": process.world_size}


def point_to(checkpoint: Path) -> None:
    """Let `latest` name a checkpoint."""
    atomic_write(checkpoint.parent / "latest", checkpoint.name)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    return states
