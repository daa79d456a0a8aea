"""What a checkpoint in the background costs training: `ldmole bench checkpoint`.

One rank trains a large adapter on a small Llama, saves, and goes on. The stall is the time in which training waits: for the
call that begins the checkpoint, for the copy to host memory before the next update, and for making it valid. The save takes
from that call until the checkpoint is valid.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ldmole_dist.checkpoint.save import Saver
from ldmole_dist.config import Backbone, Config, Data, Optimisation, Run
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import resolve_run
from ldmole_dist.engine.startup import start
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.config import LdMoleConfig


class Sizes(NamedTuple):
    """Of the Llama and its adapter; the default has about 100 million trainable parameters."""

    hidden: int = 1024
    layers: int = 11
    experts: int = 32
    rank: int = 16


class Measured(NamedTuple):
    """Medians over the checkpoints: seconds of a usual step, of a step while one is written, of the stall, of the save."""

    parameters: int
    bytes: int
    step: float
    step_meanwhile: float
    stall: float
    save: float


def measure(sizes: Sizes, checkpoints: int) -> Measured:
    """Train and save on this rank."""
    process = start()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(Backbone("small Llama"), Data("none"), Run(folder), optimisation=Optimisation(max_steps=1))
        config.optimisation.global_batch_size = config.optimisation.micro_batch_size
        engine = _engine(sizes, config, process.device)
        saver = Saver(Path(folder), config, process, data={})
        usual = [_step(engine, saver)[0] for _ in range(4)][1:]
        meanwhile, stalls, saves = [], [], []
        for number in range(1, checkpoints + 1):
            begun = time.perf_counter()
            saver.save(engine, number)
            stall = time.perf_counter() - begun
            while not saver.done:
                seconds, waited = _step(engine, saver)
                meanwhile.append(seconds)
                stall += waited
            last = time.perf_counter()
            saver.finish()
            stalls.append(stall + time.perf_counter() - last)
            saves.append(time.perf_counter() - begun)
        size = sum(path.stat().st_size for path in Path(folder).glob(f"step_{checkpoints:08d}/*"))
    parameters = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    return Measured(parameters, size, *map(statistics.median, (usual, meanwhile, stalls, saves)))


def _engine(sizes: Sizes, config: Config, device: torch.device) -> Engine:
    llama = LlamaConfig(
        vocab_size=256,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 11 // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    adapter = LdMoleConfig(num_experts=sizes.experts, r=sizes.rank, lambda_hidden=16, task_type="CAUSAL_LM")
    backbone = LlamaForCausalLM(llama)
    model = get_peft_model(torch.nn.Module.to(backbone, device), adapter)
    return Engine(model.train(), resolve_run(config, world_size=1), config.optimisation)


def _step(engine: Engine, saver: Saver) -> tuple[float, float]:
    """Seconds of an optimizer step, and how many of them it waited for a copy."""
    begun = time.perf_counter()
    ids = torch.randint(0, 256, (1, 64), device=next(engine.module.parameters()).device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    before = time.perf_counter()
    saver.wait_for_copy()
    waited = time.perf_counter() - before
    engine.step()
    return time.perf_counter() - begun, waited


def bench_checkpoint(sizes: Sizes | None = None, checkpoints: int = 3) -> Measured:
    """Measure in a process of its own.

    Args:
        sizes: of model and adapter.
        checkpoints: to write, one after the other.
    """
    with LocalRanks(1, timeout=900) as ranks:
        return ranks.run(measure, sizes or Sizes(), checkpoints)[0]


def print_measured(m: Measured) -> None:
    """Print what `bench_checkpoint` measured."""
    print(f"{m.parameters:,} trainable parameters, {m.bytes / 1e6:,.0f} MB a checkpoint; torch {torch.__version__}")
    print(f"a save takes {m.save:.2f} s, {m.bytes / 1e6 / m.save:,.0f} MB/s, hashed and on the disk")
    print(f"training waits {1e3 * m.stall:.1f} ms for it: {m.stall / m.save:.1%} of that")
    print(f"a step takes {m.step:.2f} s, {m.step_meanwhile:.2f} s while it is written")
