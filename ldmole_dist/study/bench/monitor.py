"""Measure how much reporting slows down an optimizer step: `ldmole bench monitor`.

Two ranks that share the experts run optimizer steps of three kinds in turns: "silent" without a report, "plain" with
the report that training writes at every step, "detailed" with a detailed report (`run.detail_every`). Reporting
includes the reductions over ranks, and writing files and TensorBoard events. The time is measured on rank 0, which
writes: the CPU time of all its threads, or wall-clock time on a GPU.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldmole_dist.config import Run
from ldmole_dist.distributed import Process
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.loss import answer_loss
from ldmole_dist.model.backbone import enable_gradient_checkpointing
from ldmole_dist.monitor.meter import StepMeter
from ldmole_dist.monitor.writer import Monitor
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.machine import setup
from ldmole_dist.study.random_model import engine_for, llama_config, random_model
from ldmole_dist.study.table import markdown_table
from ldmole_dist.study.timing import time_in_turns, timed
from ldmole_dist.tuner.model import tuner_of

RANKS = 2
VOCABULARY = 4096


class Sizes(NamedTuple):
    """Sizes of the model and of a micro-batch.

    The default model is that of the quickstart, with half of the layers and a smaller vocabulary.

    Args:
        hidden: hidden size of the Llama.
        intermediate: hidden size of the Llama's MLP.
        layers: number of decoder layers.
        sequences: sequences per rank and micro-batch.
        length: tokens per sequence.
    """

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 15
    sequences: int = 16
    length: int = 24


LEVELS = ("silent", "plain", "detailed")


def overhead(seconds: Mapping[str, Sequence[float]], interval: int) -> float:
    """Return the time that reporting adds to a step, as a fraction of the median silent step.

    The added time is median(plain - silent) + median(detailed - plain) / interval, with differences within a turn and
    medians over turns. Medians are used because other programs slow down single steps.

    Args:
        seconds: level of reporting -> seconds of a step in each turn.
        interval: number of steps from one detailed report to the next.
    """
    silent, plain, detailed = (seconds[level] for level in LEVELS)
    report = statistics.median(p - s for p, s in zip(plain, silent, strict=True))
    detail = statistics.median(d - p for d, p in zip(detailed, plain, strict=True))
    return (report + detail / interval) / statistics.median(silent)


def measure(sizes: Sizes, turns: int) -> dict[str, list[float]]:
    """Time optimizer steps of this rank with each level of reporting. Collective: every rank must call it.

    Args:
        sizes: sizes of the model and of a micro-batch.
        turns: timed turns, each with one step per level.

    Returns:
        Level of reporting -> seconds of a step in each turn.
    """
    process = start()
    parallel = expert_parallel(process.world_size)
    backbone = llama_config(sizes.hidden, sizes.intermediate, sizes.layers, 9, 3, VOCABULARY)
    model = random_model(backbone, {"lora_dropout": 0.0}, process.device, parallel=parallel)
    enable_gradient_checkpointing(model)
    engine = engine_for(model, micro_batch=sizes.sequences)
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(Path(folder), process.is_main, first_step=0)
        steps = itertools.count(1)

        def time_once(level: str) -> float:
            run = partial(_step, engine, process, sizes, level, monitor, next(steps))
            return timed(run, process.device, barrier=True)

        seconds = time_in_turns(LEVELS, turns, time_once)
        monitor.close()
        monitor.check()
    return seconds


def _step(engine: Engine, process: Process, sizes: Sizes, level: str, monitor: Monitor, step: int) -> None:
    """Run one optimizer step as the trainer does, with the given level of reporting."""
    meter = None if level == "silent" else StepMeter(engine, process, detailed=level == "detailed")
    ids = torch.randint(0, VOCABULARY, (sizes.sequences, sizes.length), device=process.device)
    batch: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    last = torch.tensor([sizes.length - 2], device=process.device)
    logits = engine(**batch, logits_to_keep=last).logits
    task = answer_loss(logits, ids[:, -1:]) / sizes.sequences
    loss = task + tuner_of(engine.module).context.auxiliary_loss()
    engine.backward(loss)
    if meter is None:
        engine.step()
        return
    meter.add(loss.detach(), task.detach(), batch)
    report = meter.report()
    engine.step()
    monitor.step(step, report)


def main(turns: int) -> None:
    """Measure the default sizes, and print the step times and the overhead at the default `run.detail_every`."""
    sizes, interval = Sizes(), Run("").detail_every
    with LocalRanks(RANKS, timeout=900) as ranks:
        seconds = ranks.run(measure, sizes, turns)[0]
    print(f"Optimizer steps of {RANKS} ranks, ep_size {RANKS}, {sizes}; {setup()}")
    rows = [
        {"reporting": level, "ms": 1e3 * statistics.median(s), "least": 1e3 * min(s), "most": 1e3 * max(s)}
        for level, s in seconds.items()
    ]
    print(markdown_table(rows))
    print(f"overhead with a detailed report every {interval} steps: {overhead(seconds, interval):.2%} of a silent step")
