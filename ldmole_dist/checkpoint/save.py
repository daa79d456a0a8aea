"""Write checkpoints in the background while training continues.

1. `Saver.save` records the counters and random states at once and starts a thread. The thread copies this rank's optimizer
   shards to host memory and writes them from there.
2. Training continues with the next forward. Only the next optimizer step waits for the copy (`wait_for_copy`).
3. When the files of all ranks are on disk, `finish` writes the manifest, renames the folder and updates `latest`. The training
   loop checks with an all-reduce at the end of each step whether the files are on disk. Before the next save and at the end
   of training, `finish` waits for the files.

With run.save_async=false, `save` does all of this before it returns, and copies only one tensor at a time to host memory.

A crash at any moment leaves earlier checkpoints intact. The threads run no collectives, which would interleave with those of
training.
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

from ldmole_dist.checkpoint.export import CONFIG_NAME, write_adapter_config
from ldmole_dist.checkpoint.files import TensorSpec, write_tensors
from ldmole_dist.checkpoint.manifest import MANIFEST_NAME, Manifest, fingerprint
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

HEARTBEAT_SECONDS = 10  # interval while waiting for a write; far below the default of --stall-minutes (10 minutes)


@dataclass
class _PendingCheckpoint:
    """Checkpoint that this rank is writing.

    `copied` is set once the optimizer may change the shards: they are in host memory, or the write has ended. After the write,
    `digest` describes this rank's file, or `error` is set.
    """

    step: int
    unfinished: Path
    manifest: Manifest
    thread: threading.Thread | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    digest: Digest | None = None
    error: Exception | None = None


class Saver:
    """Writer of a run's checkpoints; every rank has one and makes the same calls.

    Args:
        folder: folder of the run's checkpoints.
        config: config of the run.
        process: this rank.
        data: values that determine the order of the examples (`data.batches.describe_order`).
    """

    def __init__(self, folder: Path, config: Config, process: Process, data: dict[str, int | str]) -> None:
        self.folder, self.config, self.process, self.data = folder, config, process, data
        self._pending: _PendingCheckpoint | None = None
        # Host buffers, which every checkpoint reuses: pinned memory is slow to allocate.
        self._host: dict[str, Tensor] = {}

    def save(self, engine: Engine, step: int) -> None:
        """Finish the pending checkpoint, if any, and start to save the state after `step` optimizer steps.

        Collective: every rank must call it.

        Raises:
            UserError, PeerError: if the pending checkpoint cannot be written, the folder of the new one cannot be created or,
                with run.save_async=false, the new one cannot be written.
        """
        self.finish()
        heartbeat(f"saving after step {step}")
        create_moments(engine)
        final = self.folder / f"step_{step:08d}"
        unfinished = unfinished_folder(final)
        with raise_on_all_ranks("preparing the checkpoint"), write_errors(f"the checkpoint {unfinished}"):
            if self.process.is_main:
                # Remove the folders that a run left if it was killed while it wrote or removed a checkpoint.
                for left in [*self.folder.glob(".step_*"), *self.folder.glob(".removed_*")]:
                    shutil.rmtree(left, ignore_errors=True)
                start_folder(final)
                write_adapter_config(engine.module, unfinished)
            shards = [shard.without_copies() for shard in optimizer_shards(engine)]
            pending = _PendingCheckpoint(step, unfinished, self._manifest(engine, step))
        random_states = _random_states(self.process.device)
        self._pending = pending
        if not self.config.run.save_async:
            self._write(pending, shards, random_states, None)
            self.finish()
            return
        # The copy runs on its own stream and must wait for the kernels that training has queued so far.
        ready = torch.cuda.Event() if self.process.device.type == "cuda" else None
        if ready is not None:
            ready.record()
        pending.thread = threading.Thread(target=self._write, args=(pending, shards, random_states, ready), daemon=True)
        pending.thread.start()

    def wait_for_copy(self) -> None:
        """Wait until the pending checkpoint, if any, no longer reads the shards. Call it before each optimizer step."""
        if self._pending is not None:
            self._pending.copied.wait()

    @property
    def done(self) -> bool:
        """Whether a checkpoint is pending and this rank has written its file or failed to write it."""
        return self._pending is not None and (self._pending.thread is None or not self._pending.thread.is_alive())

    def finish(self) -> None:
        """Wait for the files of all ranks and publish the pending checkpoint; do nothing if none is pending.

        Collective: every rank must call it.

        Raises:
            UserError, PeerError: if the checkpoint could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        while pending.thread is not None and pending.thread.is_alive():
            heartbeat("writing a checkpoint")  # repeatedly: a large checkpoint must not look like a stall
            pending.thread.join(HEARTBEAT_SECONDS)
        with raise_on_all_ranks("writing the checkpoint"), write_errors(f"the checkpoint {pending.unfinished}"):
            if pending.error is not None:
                raise pending.error
        digests: list[Any] = [None] * self.process.world_size
        dist.all_gather_object(digests, pending.digest)
        with raise_on_all_ranks("finishing the checkpoint"), write_errors(f"the checkpoint {pending.unfinished}"):
            if self.process.is_main:
                self._publish(pending, digests)

    def _write(
        self,
        pending: _PendingCheckpoint,
        shards: list[OptimizerShard],
        random_states: dict[str, Tensor],
        ready: torch.cuda.Event | None,
    ) -> None:
        """Write this rank's file, in a thread with run.save_async. An error is stored in `pending`, and `finish` raises it."""
        try:
            states = {f"{state}/{shard.name}": value for shard in shards for state, value in shard.states.items()}
            starts = {f"{state}/{shard.name}": shard.start for shard in shards for state in shard.states}
            if self.config.run.save_async:
                states = self._copy_to_host(states, ready)
                pending.copied.set()
            tensors = states | random_states
            specs = [TensorSpec(key, value.shape, value.dtype) for key, value in tensors.items()]
            path = pending.unfinished / f"rank_{self.process.rank:05d}.safetensors"
            pending.digest = write_tensors(path, specs, tensors.values(), {"starts": json.dumps(starts)})
            sync(pending.unfinished)
        except Exception as error:
            pending.error = error
        finally:
            pending.copied.set()  # also after an error, because `wait_for_copy` waits without a timeout

    def _copy_to_host(self, states: dict[str, Tensor], ready: torch.cuda.Event | None) -> dict[str, Tensor]:
        stream = None
        if ready is not None:
            torch.cuda.set_device(self.process.device)  # each thread has its own current device
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

    def _publish(self, pending: _PendingCheckpoint, digests: list[Digest]) -> None:
        """Write the manifest, give the folder its final name, update `latest`, and remove checkpoints beyond run.keep_last."""
        final = self.folder / f"step_{pending.step:08d}"
        files = dict(zip(pending.manifest.rank_files(), digests, strict=True))
        pending.manifest.files = files | {CONFIG_NAME: file_digest(pending.unfinished / CONFIG_NAME)}
        atomic_write(pending.unfinished / MANIFEST_NAME, pending.manifest.to_json())
        if final.exists():  # the same step was saved before
            self._remove(final)
        publish_folder(final)
        set_latest(final)
        for old in sorted(self.folder.glob("step_*"))[: -self.config.run.keep_last]:
            self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        # The folder is renamed first, so that a partly removed one never looks like a checkpoint. It is removed in a thread,
        # because large files take time. The thread is not a daemon thread, so that the process waits for it before it exits,
        # up to the limit of `exit_process`.
        removed = checkpoint.rename(self.folder / f".removed_{checkpoint.name}_{time.time_ns()}")
        threading.Thread(target=shutil.rmtree, args=(removed,), kwargs={"ignore_errors": True}).start()

    def _manifest(self, engine: Engine, step: int) -> Manifest:
        shapes, keys = full_shapes(engine), adapter_keys(engine.module)
        return Manifest(
            step=step,
            topology=topology(engine, self.process),
            shapes={name: list(shape) for name, shape in shapes.items()},
            adapter_keys={name: keys[name] for name in shapes},
            training=training_state(engine, step),
            data=self.data,
            backbone={"path": self.config.backbone.path, "fingerprint": fingerprint(self.config.backbone.path)},
            config=plain_config(self.config),
            files={},
        )


def topology(engine: Engine, process: Process) -> dict[str, int]:
    """Return the ZeRO stage, ep_size and world size of this run, under their names in the manifest."""
    return {"zero_stage": engine.stage, "ep_size": engine.parallel.size, "world_size": process.world_size}


def set_latest(checkpoint: Path) -> None:
    """Write the name of a checkpoint to the file `latest` beside it."""
    atomic_write(checkpoint.parent / "latest", checkpoint.name)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    return states
