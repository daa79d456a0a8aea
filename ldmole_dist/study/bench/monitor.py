"""What watching a run costs it: `ldmole bench monitor`.

Optimizer steps that report nothing, what every step reports, and what a detailed one does (`run.detail_every`), in turns in one
run, on ranks that share the experts. Reporting includes the reductions over ranks and the writing of files and TensorBoard, and
the time is that of the rank that writes: CPU time of all its threads, on a GPU wall clock.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ldmole_dist.config import Backbone, Config, Data, Optimisation, Parallelism, Run
from ldmole_dist.distributed import Process
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import resolve_run
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.loss import answer_loss
from ldmole_dist.model.backbone import enable_gradient_checkpointing
from ldmole_dist.monitor.meter import StepMeter
from ldmole_dist.monitor.writer import Monitor
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.model import spread_experts, tuner_of

KINDS = ("silent", "plain", "detailed")


class Sizes(NamedTuple):
    """Of the model and a rank's micro-batch; the default is the quickstart's, with half of its layers."""

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 15
    sequences: int = 16
    length: int = 24


class Measured(NamedTuple):
    """Seconds of a step of each kind, turn by turn."""

    silent: list[float]
    plain: list[float]
    detailed: list[float]

    def overhead(self, interval: int) -> float:
        """Share of a silent step that reporting takes on average, with a detailed report every `interval` steps.

        Differences are taken within a turn, of their medians the sum: what else the machine does disturbs single steps.
        """
        plain = statistics.median(p - s for p, s in zip(self.plain, self.silent, strict=True))
        detail = statistics.median(d - p for d, p in zip(self.detailed, self.plain, strict=True))
        return (plain + detail / interval) / statistics.median(self.silent)


def measure(sizes: Sizes, turns: int) -> Measured:
    """Take turns on this rank and its peers; every rank calls it."""
    process = start()
    engine = _engine(sizes, process)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    clock = time.process_time if process.device.type == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(Path(folder), process.is_main, first_step=0)
        for turn in range(turns + 1):
            # In another order each time: what a step leaves behind would else always meet the same kind.
            for kind in random.Random(turn).sample(KINDS, len(KINDS)):
                dist.barrier()
                begun = clock()
                _step(engine, process, sizes, kind, monitor, turn + 1)
                dist.barrier()
                if turn:  # the first warms up
                    seconds[kind].append(clock() - begun)
        monitor.close()
        monitor.check()
    return Measured(**seconds)


def _engine(sizes: Sizes, process: Process) -> Engine:
    optimisation = Optimisation(max_steps=1, micro_batch_size=sizes.sequences)
    optimisation.global_batch_size = sizes.sequences * process.world_size
    config = Config(
        Backbone("Llama"),
        Data("none"),
        Run("none"),
        optimisation=optimisation,
        parallelism=Parallelism(precision="fp32"),
    )
    llama = LlamaConfig(
        vocab_size=4096,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    backbone = torch.nn.Module.to(LlamaForCausalLM(llama), process.device)
    spread_experts(backbone, expert_parallel(process.world_size))
    model: PeftModel = get_peft_model(backbone, LdMoleConfig(lora_dropout=0.0, task_type="CAUSAL_LM"))
    enable_gradient_checkpointing(model)
    return Engine(model.train(), resolve_run(config, process.world_size), optimisation)


def _step(engine: Engine, process: Process, sizes: Sizes, kind: str, monitor: Monitor, step: int) -> None:
    """One optimizer step as the trainer's, at the level of reporting that `kind` says."""
    meter = None if kind == "silent" else StepMeter(engine, process, detailed=kind == "detailed")
    ids = torch.randint(0, 4096, (sizes.sequences, sizes.length), device=process.device)
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


def bench_monitor(ranks: int = 2, sizes: Sizes | None = None, turns: int = 8) -> Measured:
    """Measure on ranks of this machine, which share the experts.

    Args:
        ranks: that many.
        sizes: of the model and of a micro-batch.
        turns: of a step of each kind, after one that warms up.
    """
    with LocalRanks(ranks, timeout=900) as processes:
        return processes.run(measure, sizes or Sizes(), turns)[0]


def print_measured(m: Measured, sizes: Sizes, ranks: int, interval: int) -> None:
    """Print what `bench_monitor` measured."""
    print(
        f"optimizer steps of {ranks} ranks, ep_size {ranks}: Llama of {sizes.layers} layers, hidden {sizes.hidden}, all "
        f"linears adapted, E=8, r=8, {sizes.sequences} x {sizes.length} tokens a rank; torch {torch.__version__}"
    )
    for kind in KINDS:
        values = getattr(m, kind)
        print(
            f"  {kind:9}{1e3 * statistics.median(values):9.1f} ms (of {len(values)}: {1e3 * min(values):.1f} to "
            f"{1e3 * max(values):.1f})"
        )
    print(f"reporting takes {m.overhead(interval):.2%} of a silent step with a detailed report every {interval} steps")
