"""Execute the missing runs of a comparison. Each method with each seed is a training run in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ldmole_dist.config import Config, dump_config
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_write
from ldmole_dist.study.compare.methods import overrides_of
from ldmole_dist.study.compare.store import Store, row_of

Cell = tuple[str, int]  # a method and a seed


def run_missing(store: Store, base: Config, cells: Sequence[Cell], jobs: int) -> None:
    """Run the cells that have no row in the store, and add their rows.

    An interrupted run resumes from its last checkpoint.

    Args:
        store: folder of the comparison.
        base: config that all runs start from.
        cells: all runs. Only the first one also evaluates before training, because the result is the same for all runs.
        jobs: number of concurrent runs; each uses one GPU, or one CPU thread.

    Raises:
        UserError: if a run fails; the message has the last line of its log. Before that, the other runs are stopped
            and save a checkpoint.
    """
    known = {(row.method, row.seed) for row in store.rows()}
    waiting = [cell for cell in cells if cell not in known]
    running: dict[int, tuple[Cell, subprocess.Popen[bytes]]] = {}  # slot -> run; with GPUs, a slot is a GPU index
    progress = tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run")
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    cell = waiting.pop(0)
                    running[slot] = cell, _start(store, base, cell, slot, before=cell == cells[0])
                    progress.set_description(
                        ", ".join(f"{method} seed {seed}" for (method, seed), _ in running.values())
                    )
            time.sleep(0.2)
            for slot, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode != 0:
                        raise UserError(
                            f"{cell[0]} with seed {cell[1]} failed: {_last_log_line(store, cell)}; fix the cause, then run "
                            "the same command again to resume"
                        )
                    store.add(row_of(*cell, folder_of(store, cell)))
                    progress.update()
    finally:
        progress.close()
        for _, process in running.values():  # on SIGTERM a run saves a checkpoint and exits
            process.send_signal(signal.SIGTERM)
        for _, process in running.values():
            process.wait()


def folder_of(store: Store, cell: Cell) -> Path:
    """Return the output folder of one run."""
    return store.path / cell[0] / f"seed_{cell[1]}"


def _start(store: Store, base: Config, cell: Cell, slot: int, before: bool) -> subprocess.Popen[bytes]:
    (method, seed), folder = cell, folder_of(store, cell)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".yaml")
    atomic_write(config, dump_config(base))
    overrides = [
        *overrides_of(method, base.adapter, base.backbone.path),
        f"run.seed={seed}",
        f"run.output_dir={folder}",
        f"run.eval_before={str(before).lower()}",
    ]
    # Remove the variables of a launcher that may have started this process: a run has one rank.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(slot)
    else:
        environment["OMP_NUM_THREADS"] = "1"
    with folder.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "ldmole_dist.cli", "train", str(config), *overrides]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _last_log_line(store: Store, cell: Cell) -> str:
    path = folder_of(store, cell).with_suffix(".log")
    lines = [line for line in path.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else 'no output'} (log: {path})"
