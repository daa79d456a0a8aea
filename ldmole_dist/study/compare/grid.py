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
from ldmole_dist.study.compare.rows import Row, row_of
from ldmole_dist.study.folder import StudyFolder

Cell = tuple[str, int]  # a method and a seed


def run_missing(study: StudyFolder[Row], base: Config, cells: Sequence[Cell], jobs: int) -> None:
    """Run the cells that have no row in the study, and add their rows.

    An interrupted run resumes from its last checkpoint.

    Args:
        study: folder of the comparison.
        base: config that all runs start from.
        cells: all runs. Only the first one also evaluates before training, because the result is the same for all runs.
        jobs: number of concurrent runs; each uses one GPU, or one CPU thread.

    Raises:
        UserError: if a run fails; the message has the last line of the failed run's log. The other running runs are
            stopped and save a checkpoint before the error is raised.
    """
    known = {(row.method, row.seed) for row in study.rows()}
    waiting = [cell for cell in cells if cell not in known]
    running: dict[int, tuple[Cell, subprocess.Popen[bytes]]] = {}  # slot -> run; with GPUs, a slot is a GPU index
    progress = tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run")
    try:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting:
                    cell = waiting.pop(0)
                    running[slot] = cell, _start(folder_of(study.path, cell), base, cell, slot, before=cell == cells[0])
                    progress.set_description(", ".join(f"{name} seed {seed}" for (name, seed), _ in running.values()))
            time.sleep(0.2)
            for slot, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    folder = folder_of(study.path, cell)
                    if process.returncode != 0:
                        raise UserError(
                            f"{cell[0]} with seed {cell[1]} failed: {_last_log_line(folder)}; fix the cause, then run "
                            "the same command again to resume"
                        )
                    study.add(row_of(*cell, folder))
                    progress.update()
    finally:
        progress.close()
        for _, process in running.values():  # on SIGTERM a run saves a checkpoint and exits
            process.send_signal(signal.SIGTERM)
        for _, process in running.values():
            process.wait()


def folder_of(study: Path, cell: Cell) -> Path:
    """Return the output folder of one run in the folder of a comparison."""
    return study / cell[0] / f"seed_{cell[1]}"


def _start(folder: Path, base: Config, cell: Cell, slot: int, before: bool) -> subprocess.Popen[bytes]:
    """Start the training run of a cell in a new process and return the process.

    Args:
        folder: output folder of the run; its config and log are beside it, with the suffixes .yaml and .log.
        base: config that all runs start from.
        cell: method and seed.
        slot: index of the GPU to use; without effect on a CPU.
        before: whether to evaluate before training.
    """
    method, seed = cell
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
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"CUDA_VISIBLE_DEVICES": str(slot)} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("ab") as log:
        command = [sys.executable, "-m", "ldmole_dist.cli", "train", str(config), *overrides]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _last_log_line(folder: Path) -> str:
    """Return the last non-blank line of a run's log, cut to 300 characters, or "no output"; with the path of the log."""
    path = folder.with_suffix(".log")
    lines = [line for line in path.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else 'no output'} (log: {path})"
