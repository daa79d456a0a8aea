"""Measure one cell: train a Llama with an adapter on new processes and time the optimizer steps."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
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

WARMUP = 4  # optimizer steps before the timed ones; on two ranks the first four took up to 1.5 times as long
_RESET_PEAK = "5"  # value for /proc/self/clear_refs that resets the peak resident set size, see proc(5)


@dataclass(frozen=True)
class Measured:
    """Results of a cell; the fields are columns of cells.csv.

    Args:
        seconds: time of an optimizer step: of the slowest rank, median over the steps.
        steps: seconds of each step on the slowest rank, in order.
        cpu_seconds: CPU time of an optimizer step on all ranks, median over the steps.
        cores_elsewhere: mean number of cores that other programs kept busy.
        peak_bytes: peak memory of the rank that needs most: allocated on its GPU, or on a CPU the resident memory beyond
            that of the process before it built the model.
        experts_per_token: active experts of a token, mean over ranks and linears in the last forward.
        wire: elements that a rank sends for its experts in one step, by kind, mean over ranks.
        wire_bytes: bytes that a rank sends for its experts in one step, mean over ranks.
        tokens_per_second: tokens of all ranks per second.
    """

    seconds: float
    steps: list[float]
    cpu_seconds: float
    cores_elsewhere: float
    peak_bytes: int
    experts_per_token: float
    wire: dict[str, float]
    wire_bytes: float
    tokens_per_second: float


def measure(cell: Cell, steps: int, warmup: int, timeout: float) -> Measured:
    """Measure `steps` optimizer steps of a cell after `warmup` others, in new processes.

    Raises:
        RankFailed: if the cell fails, or takes longer than `timeout` seconds with its start-up.
    """
    with LocalRanks(cell.ranks, timeout) as ranks:
        return summary(cell, ranks.run(run_cell, cell, steps, warmup))


def summary(cell: Cell, of_ranks: list[dict[str, Any]]) -> Measured:
    """Combine the results of `run_cell` on all ranks."""
    seconds = [max(step) for step in zip(*(r["seconds"] for r in of_ranks), strict=True)]
    cpu = [sum(step) for step in zip(*(r["cpu_seconds"] for r in of_ranks), strict=True)]
    wire: Counter[str] = sum((Counter(r["wire"]) for r in of_ranks), Counter())
    median = statistics.median(seconds)
    return Measured(
        seconds=median,
        steps=seconds,
        cpu_seconds=statistics.median(cpu),
        cores_elsewhere=max(0.0, of_ranks[0]["busy"] - sum(cpu)) / sum(seconds),
        peak_bytes=max(r["peak_bytes"] for r in of_ranks),
        experts_per_token=statistics.mean(r["experts_per_token"] for r in of_ranks),
        wire={kind: number / cell.ranks for kind, number in sorted(wire.items())},
        wire_bytes=sum(r["wire_bytes"] for r in of_ranks) / cell.ranks,
        tokens_per_second=cell.tokens / median,
    )


def run_cell(cell: Cell, steps: int, warmup: int) -> dict[str, Any]:
    """Train this rank's part of a cell and return its measurements; every rank calls it."""
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
    if on_cpu:
        peak_kb = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert peak_kb is not None
        peak = 1024 * int(peak_kb[1])
    else:
        peak = torch.cuda.max_memory_allocated(process.device)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "busy": busy,
        "peak_bytes": peak - before,
        "experts_per_token": statistics.mean(float(stat[0]) / tokens for stat in context.stats.values()),
        "wire": dict(engine.parallel.wire.by_kind()),
        "wire_bytes": engine.parallel.wire.bytes.total(),
    }


def micro_batch(cell: Cell, index: int, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Draw sequences of random tokens whose last few tokens are labels."""
    generator = torch.Generator().manual_seed(index * 10_007 + rank)
    ids = torch.randint(0, VOCABULARY, (cell.micro_batch, cell.seq), generator=generator)
    labels = ids.clone()
    labels[:, :-ANSWERS] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def _busy_core_seconds() -> float:
    """Return the seconds that the machine's cores have computed since boot, summed over cores and programs."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
