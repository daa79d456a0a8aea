"""One cell on a fresh group of ranks: a Llama with an adapter in the DeepSpeed engine, its optimizer steps timed."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from ldmole_dist.config import Optimisation
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import load_ds_config, resolve_ds_config
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.loss import IGNORED, answer_loss
from ldmole_dist.method.context import LossWeights
from ldmole_dist.model.backbone import DTYPES, enable_gradient_checkpointing
from ldmole_dist.model.forward import batch_logits
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.dispatch import synchronize
from ldmole_dist.study.scaling.cells import ANSWERS, LAMBDA_HIDDEN, VOCABULARY, Cell
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import spread_experts, tuner_of

WARMUP = 4  # optimizer steps that do not count: over two ranks the first four took up to half as long again
_RESET_PEAK = "5"  # proc(5), clear_refs: the peak of the resident set begins again


@dataclass(frozen=True)
class Measured:
    """What a cell came to, per optimizer step.

    Args:
        seconds: median over steps; of each step the slowest rank's.
        steps: seconds of each, in order.
        cpu_seconds: of all ranks, median over steps.
        cores_elsewhere: that other programs kept busy meanwhile, mean over steps.
        peak_bytes: of the rank that needs most: allocated on its GPU; without one resident in memory, beyond the process
            before it had a model.
        experts_per_token: active ones, mean over ranks and linears of the last forward.
        wire: elements that a rank sends for its experts in the last step, by kind; mean over ranks.
        wire_bytes: of all kinds together.
        tokens_per_second: all ranks together.
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
    """Run a cell in processes of its own.

    Args:
        cell: to run.
        steps: optimizer steps that count.
        warmup: optimizer steps before them.
        timeout: seconds for all of it, start-up included.

    Raises:
        RankFailed: where it fails or takes longer.
    """
    with LocalRanks(cell.ranks, timeout) as ranks:
        return summary(cell, ranks.run(run_cell, cell, steps, warmup))


def summary(cell: Cell, of_ranks: list[dict[str, Any]]) -> Measured:
    """All ranks' `run_cell` as one."""
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
    """This rank's part of a cell; every rank calls it."""
    process = start()
    before = _resident() if process.device.type == "cpu" else 0
    engine = build_engine(cell, process.device)
    times, cpu, busy = [], [], 0.0
    for step in range(warmup + steps):
        if step == warmup:
            _reset_peak(process.device)
        batches = [micro_batch(cell, step * 1000 + i, process.rank, process.device) for i in range(cell.accumulation)]
        engine.parallel.wire.clear()
        synchronize(process.device)
        dist.barrier()
        begun, cpu_begun, busy_begun = time.perf_counter(), time.process_time(), _busy()
        for batch in batches:
            _train(engine, batch, cell)
        synchronize(process.device)
        if step >= warmup:
            times.append(time.perf_counter() - begun)
            cpu.append(time.process_time() - cpu_begun)
            busy += _busy() - busy_begun
    stats = tuner_of(engine.module).context.stats.values()
    tokens = cell.micro_batch * cell.seq
    return {
        "seconds": times,
        "cpu_seconds": cpu,
        "busy": busy,
        "peak_bytes": _peak(process.device) - before,
        "experts_per_token": statistics.mean(float(stat[0]) / tokens for stat in stats),
        "wire": dict(engine.parallel.wire.by_kind()),
        "wire_bytes": sum(engine.parallel.wire.bytes.values()),
    }


def build_engine(cell: Cell, device: torch.device) -> Engine:
    """The cell's model with random weights in an engine; every rank calls it."""
    parallel = expert_parallel(cell.ep_size, cell.dispatch)  # type: ignore[arg-type]  # checked with the cell
    torch.manual_seed(0)
    backbone = torch.nn.Module.to(LlamaForCausalLM(cell.backbone()), dtype=DTYPES[cell.precision], device=device)
    spread_experts(backbone, parallel)
    adapter = LdMoleConfig(
        num_experts=cell.experts,
        r=cell.lora_rank,
        lambda_hidden=LAMBDA_HIDDEN,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(backbone, adapter)
    tuner_of(model).context.weights = LossWeights(balance=0.01)
    enable_gradient_checkpointing(model)
    ds_config = resolve_ds_config(
        load_ds_config(f"zero{cell.stage}"),
        micro_batch_size=cell.micro_batch,
        accumulation=cell.accumulation,
        max_grad_norm=1.0,
        precision=cell.precision,
        ep_size=cell.ep_size,
    )
    return Engine(model.train(), ds_config, Optimisation(schedule="constant"))


def micro_batch(cell: Cell, index: int, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, the last few of every sequence to be predicted."""
    generator = torch.Generator().manual_seed(index * 10_007 + rank)
    ids = torch.randint(0, VOCABULARY, (cell.micro_batch, cell.seq), generator=generator)
    labels = ids.clone()
    labels[:, :-ANSWERS] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def _train(engine: Engine, batch: dict[str, Tensor], cell: Cell) -> None:
    targets, logits = batch_logits(engine, batch)
    task = answer_loss(logits, targets) / (cell.micro_batch * ANSWERS)
    engine.backward(task + tuner_of(engine.module).context.auxiliary_loss())
    engine.step()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    else:
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    if device.type != "cpu":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _busy() -> float:
    """Seconds that the machine's cores have been busy since it started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _resident() -> int:
    return psutil.Process().memory_info().rss
