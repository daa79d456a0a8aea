"""Measure one cell: train a Llama with an adapter in new processes and time the optimizer steps."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.loss import IGNORED, answer_loss
from ldmole_dist.model.backbone import enable_gradient_checkpointing
from ldmole_dist.model.forward import batch_logits
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.random_model import engine_for, random_model
from ldmole_dist.study.scaling.cells import ANSWERS, LAMBDA_HIDDEN, VOCABULARY, Cell
from ldmole_dist.study.timing import synchronize
from ldmole_dist.tuner.model import tuner_of

WARMUP = 4  # untimed optimizer steps; on two ranks the first four took up to 1.5 times as long as later ones
_RESET_PEAK = "5"  # value for /proc/self/clear_refs that resets the peak resident set size, see proc(5)


@dataclass(frozen=True)
class Measured:
    """Results of a cell; the fields are keys of `measured` in cells.jsonl.

    Args:
        seconds: median of `steps`.
        steps: seconds of each timed optimizer step, maximum over ranks.
        cpu_seconds: CPU seconds of an optimizer step, summed over ranks, median over steps.
        cores_elsewhere: mean number of CPU cores that other programs used during the timed steps.
        peak_bytes: peak memory in the timed steps, maximum over ranks. On a GPU it is the allocated memory, on a CPU
            the resident memory minus that of the process before it built the model.
        experts_per_token: active experts per token in the last forward, mean over tokens, linears and ranks.
        wire_bytes: bytes that a rank sends for the experts in the last step, mean over ranks.
        tokens_per_second: tokens of an optimizer step on all ranks, divided by `seconds`.
    """

    seconds: float
    steps: list[float]
    cpu_seconds: float
    cores_elsewhere: float
    peak_bytes: int
    experts_per_token: float
    wire_bytes: float
    tokens_per_second: float


def measure(cell: Cell, steps: int, warmup: int, timeout: float) -> Measured:
    """Measure a cell in new processes.

    Args:
        cell: configuration.
        steps: number of timed optimizer steps.
        warmup: number of optimizer steps before them.
        timeout: maximum seconds for the cell, including the start-up of the processes.

    Raises:
        RankFailed: if a rank fails or the timeout expires.
        OSError: if a process cannot be started.
    """
    with LocalRanks(cell.ranks, timeout) as ranks:
        return summary(cell, ranks.run(run_cell, cell, steps, warmup))


def summary(cell: Cell, results: list[dict[str, Any]]) -> Measured:
    """Return the results of a cell, combined from those of all ranks.

    Args:
        cell: configuration that was measured.
        results: result of `run_cell` on each rank, by rank.
    """
    seconds = [max(step) for step in zip(*(r["seconds"] for r in results), strict=True)]
    cpu = [sum(step) for step in zip(*(r["cpu_seconds"] for r in results), strict=True)]
    median = statistics.median(seconds)
    return Measured(
        seconds=median,
        steps=seconds,
        cpu_seconds=statistics.median(cpu),
        cores_elsewhere=max(0.0, results[0]["busy"] - sum(cpu)) / sum(seconds),
        peak_bytes=max(r["peak_bytes"] for r in results),
        experts_per_token=statistics.mean(r["experts_per_token"] for r in results),
        wire_bytes=statistics.mean(r["wire_bytes"] for r in results),
        tokens_per_second=cell.tokens / median,
    )


def run_cell(cell: Cell, steps: int, warmup: int) -> dict[str, Any]:
    """Train a cell on this rank. Collective: every rank must call it.

    Args:
        cell: configuration.
        steps: number of timed optimizer steps.
        warmup: number of optimizer steps before them.

    Returns:
        Measurements of this rank:
        "seconds", "cpu_seconds": wall-clock and CPU seconds of each timed step.
        "busy": core-seconds of all programs on this machine during the timed steps.
        "peak_bytes", "experts_per_token", "wire_bytes": as in `Measured`, for this rank only.
    """
    process = start()
    on_cpu = process.device.type == "cpu"
    before = psutil.Process().memory_info().rss if on_cpu else 0
    parallel = expert_parallel(cell.ep_size, cell.dispatch)  # type: ignore[arg-type]  # validated by Cell.checked
    adapter = dict(num_experts=cell.experts, r=cell.lora_rank, lambda_hidden=LAMBDA_HIDDEN, lora_dropout=0.0)
    model = random_model(cell.backbone(), adapter, process.device, cell.precision, parallel)
    enable_gradient_checkpointing(model)
    engine = engine_for(model, f"zero{cell.stage}", cell.micro_batch, cell.accumulation, cell.precision, cell.ep_size)
    context = tuner_of(engine.module).context
    seconds, cpu_seconds, busy = [], [], 0.0
    for step in range(warmup + steps):
        if step == warmup:
            if on_cpu:
                Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
            else:
                torch.cuda.reset_peak_memory_stats(process.device)
        batches = [micro_batch(cell, step * 1000 + i, process.rank, process.device) for i in range(cell.accumulation)]
        engine.parallel.wire.clear()
        synchronize(process.device)
        dist.barrier()
        started = time.perf_counter(), time.process_time(), _busy_core_seconds()
        for batch in batches:
            targets, logits = batch_logits(engine, batch)
            task = answer_loss(logits, targets) / (cell.micro_batch * ANSWERS)
            engine.backward(task + context.auxiliary_loss())
            engine.step()
        synchronize(process.device)
        if step >= warmup:
            seconds.append(time.perf_counter() - started[0])
            cpu_seconds.append(time.process_time() - started[1])
            busy += _busy_core_seconds() - started[2]
    tokens = cell.micro_batch * cell.seq
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "busy": busy,
        "peak_bytes": process.peak_memory() - before,
        "experts_per_token": statistics.mean(float(stat[0]) / tokens for stat in context.stats.values()),
        "wire_bytes": engine.parallel.wire.bytes.total(),
    }


def micro_batch(cell: Cell, index: int, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Draw a micro-batch of random tokens; the last `ANSWERS` tokens of each sequence are labels.

    Args:
        cell: configuration.
        index: number of the micro-batch; seeds the draw together with `rank`.
        rank: rank that trains on it.
        device: device of the tensors.

    Returns:
        "input_ids", "attention_mask" (all 1) and "labels" (-100 before the labels), each (sequences, positions).
    """
    generator = torch.Generator().manual_seed(index * 10_007 + rank)
    ids = torch.randint(0, VOCABULARY, (cell.micro_batch, cell.seq), generator=generator)
    labels = ids.clone()
    labels[:, :-ANSWERS] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def _busy_core_seconds() -> float:
    """Return the seconds that all programs have used the machine's CPU cores since boot, summed over cores."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
