"""Running what is missing of the grid methods x seeds: each a training run in a process of its own, some at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ldmole_dist.config import Config, dump_config
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_write
from ldmole_dist.study.compare.methods import overrides_of
from ldmole_dist.study.compare.store import Store, row_of


class Cell(NamedTuple):
    """One run."""

    method: str
    seed: int


def run_missing(store: Store, base: Config, cells: Sequence[Cell], jobs: int) -> None:
    """Run the cells that have no row; a run that was cut off goes on from its last checkpoint.

    Args:
        store: where rows are.
        base: config that all runs start from.
        cells: of the grid; the first also evaluates before training, which is the same for all.
        jobs: runs at a time; with GPUs each has one, on a CPU one thread.

    Raises:
        UserError: where a run fails, with the end of its log; others are ended first and go on the next time.
    """
    known = {Cell(row.method, row.seed) for row in store.rows()}
    waiting = [cell for cell in cells if cell not in known]
    running: dict[int, tuple[Cell, subprocess.Popen[bytes]]] = {}  # by slot
    progress = tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run")
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    cell = waiting.pop(0)
                    running[slot] = cell, _started(store, base, cell, slot, before=cell == cells[0])
                    progress.set_description(", ".join(f"{c.method} seed {c.seed}" for c, _ in running.values()))
            time.sleep(0.2)
            for slot, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    if process.returncode != 0:
                        raise UserError(f"{cell.method} with seed {cell.seed} failed: {_last_words(store, cell)}")
                    store.add(row_of(cell.method, cell.seed, folder_of(store, cell)))
                    progress.update()
    finally:
        progress.close()
        for _, process in running.values():  # they save, and go on the next time
            process.send_signal(signal.SIGTERM)
        for _, process in running.values():
            process.wait()


def folder_of(store: Store, cell: Cell) -> Path:
    """Of a run."""
    return store.folder / cell.method / f"seed_{cell.seed}"


def _started(store: Store, base: Config, cell: Cell, slot: int, before: bool) -> subprocess.Popen[bytes]:
    folder = folder_of(store, cell)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".yaml")
    atomic_write(config, dump_config(base))
    overrides = [
        *overrides_of(cell.method, base.adapter, base.backbone.path),
        f"run.seed={cell.seed}",
        f"run.output_dir={folder}",
        f"run.eval_before={str(before).lower()}",
    ]
    # Every run is alone, whatever launcher started this one.
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


def _last_words(store: Store, cell: Cell) -> str:
    path = folder_of(store, cell).with_suffix(".log")
    lines = [line for line in path.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else 'it said nothing'} (all of it in {path})"
