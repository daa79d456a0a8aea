"""Measure how long training waits for an asynchronous checkpoint: `ldmole bench checkpoint`.

One rank trains a large adapter on a small Llama and saves checkpoints while training continues. The stall is the time
that training waits: for the call that starts the save, for the copy to host memory before the next optimizer update,
and for the call that publishes the checkpoint. The duration of a save is the time from the first of these calls to the
end of the last.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ldmole_dist.checkpoint.save import Saver
from ldmole_dist.config import Backbone, Config, Data, Run
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.startup import start
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.machine import setup
from ldmole_dist.study.random_model import engine_for, llama_config, random_model
from ldmole_dist.study.table import markdown_table

VOCABULARY = 256


class Sizes(NamedTuple):
    """Sizes of the Llama and its adapter; by default the adapter has about 100 million parameters.

    Args:
        hidden: hidden size of the Llama.
        layers: number of decoder layers.
        experts: experts per linear.
        lora_rank: LoRA rank of an expert.
    """

    hidden: int = 1024
    layers: int = 11
    experts: int = 32
    lora_rank: int = 16


def measure(sizes: Sizes, checkpoints: int) -> dict[str, float]:
    """Train and save checkpoints on this rank.

    Args:
        sizes: sizes of the model.
        checkpoints: number of checkpoints to save.

    Returns:
        Name of a quantity with its unit -> value. Times of a save and of the stall are medians over checkpoints, times
        of an optimizer step are medians over steps, and the size is that of the last checkpoint. Ratios are those of
        these values.
    """
    process = start()
    backbone = llama_config(sizes.hidden, sizes.hidden * 11 // 4, sizes.layers, 8, 2, VOCABULARY)
    adapter = dict(num_experts=sizes.experts, r=sizes.lora_rank, lambda_hidden=16)
    engine = engine_for(random_model(backbone, adapter, process.device))
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), Config(Backbone("small Llama"), Data("none"), Run(folder)), process, data={})
        steps = [_step(engine, saver)[0] for _ in range(4)][1:]
        steps_while_saving, stalls, saves = [], [], []
        for number in range(1, checkpoints + 1):
            started = time.perf_counter()
            saver.save(engine, number)
            stall = time.perf_counter() - started
            while not saver.done:
                seconds, waited = _step(engine, saver)
                steps_while_saving.append(seconds)
                stall += waited
            before_commit = time.perf_counter()
            saver.finish()
            stalls.append(stall + time.perf_counter() - before_commit)
            saves.append(time.perf_counter() - started)
        size = sum(path.stat().st_size for path in Path(folder).glob(f"step_{checkpoints:08d}/*"))
    stall, save = statistics.median(stalls), statistics.median(saves)
    return {
        "trainable parameters": sum(p.numel() for p in engine.module.parameters() if p.requires_grad),
        "checkpoint MB": size / 1e6,
        "save with hashes and fsync, s": save,
        "save MB/s": size / 1e6 / save,
        "training waits, ms": 1e3 * stall,
        "training waits, % of the save": 100 * stall / save,
        "optimizer step, s": statistics.median(steps),
        "optimizer step while saving, s": statistics.median(steps_while_saving),
    }


def _step(engine: Engine, saver: Saver) -> tuple[float, float]:
    """Run an optimizer step; return its seconds, and how many of them it waited for the saver's copy to host memory."""
    started = time.perf_counter()
    ids = torch.randint(0, VOCABULARY, (1, 64), device=next(engine.module.parameters()).device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    before = time.perf_counter()
    saver.wait_for_copy()
    waited = time.perf_counter() - before
    engine.step()
    return time.perf_counter() - started, waited


def main(layers: int) -> None:
    """Measure three checkpoints in a new process and print the results."""
    with LocalRanks(1, timeout=900) as ranks:
        measured = ranks.run(measure, Sizes(layers=layers), 3)[0]
    print(f"Asynchronous checkpoint of one rank, wall-clock time; {setup()}")
    print(markdown_table([{"quantity": name, "median": value} for name, value in measured.items()]))
