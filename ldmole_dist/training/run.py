"""The wiring of a training run, from its config to its adapter; the same code on one process and on many."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm

from ldmole_dist.checkpoint.export import export_adapter
from ldmole_dist.checkpoint.load import choose_checkpoint, load_checkpoint, newest
from ldmole_dist.checkpoint.save import Saver, point_to
from ldmole_dist.config import Config, Optimisation, accumulation_steps, check_parallelism, dump_config
from ldmole_dist.data.build import read_data
from ldmole_dist.distributed import Process, raise_on_all_ranks
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import resolve_run, stage_of
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.engine.training_state import element_count
from ldmole_dist.errors import UserError
from ldmole_dist.evaluation.evaluator import Evaluator
from ldmole_dist.io import atomic_write
from ldmole_dist.model.backbone import (
    load_tokenizer,
)
from ldmole_dist.model.build import build_model
from ldmole_dist.monitor.probe import Probe
from ldmole_dist.training.preemption import StopRequest
from ldmole_dist.training.trainer import Trainer
from ldmole_dist.tuner.model import is_expert_tensor


def train(config: Config) -> dict[str, float]:
    """Run a config to its end; every rank calls it.

    Returns:
        The evaluation after training.

    Raises:
        UserError, PeerError, NonFiniteLoss, Preempted: on every rank.
    """
    trainer = prepare(config)
    result = trainer.run()
    with StopRequest():  # asked to end now, it has done so as soon as the adapter is written
        export_adapter(trainer.engine, Path(config.run.output_dir) / "adapter", trainer.process)
    return result


def prepare(config: Config) -> Trainer:
    """Everything up to the first step that is left to do: data, model, engine, and what a checkpoint holds.

    Raises:
        UserError, PeerError: on every rank.
    """
    process = start(config.parallelism.timeout_minutes)
    with raise_on_all_ranks("checking the config"):
        check_parallelism(config, process.world_size)
        ds_config = resolve_run(config, process.world_size)
        tokenizer = load_tokenizer(config.backbone.path)
    data = read_data(config, tokenizer, process)
    folder = Path(config.run.output_dir)
    resumed = choose_checkpoint(config, data.described, process)
    with raise_on_all_ranks("preparing the output folder"):
        if process.is_main:
            try:
                _prepare_folder(folder, config, resumed)
            except OSError as error:
                raise UserError(
                    f"run.output_dir={str(folder)!r} cannot be prepared: {error.strerror or error} ({error.filename}); "
                    "choose a folder that can be written"
                ) from error

    parallel = expert_parallel(config.parallelism.ep_size, config.parallelism.dispatch, config.parallelism.overlap)
    model = build_model(config, parallel, process, stage_of(ds_config), tokenizer.pad_token_id)
    total_steps = number_of_steps(config.optimisation, data.size)
    engine = Engine(model, ds_config, config.optimisation, total_steps)
    # Every rank drops out other units; what must be equal on all of them was drawn before.
    torch.manual_seed(config.run.seed * 1_000_003 + process.rank)
    first_step = 0
    if resumed is not None:
        first_step = load_checkpoint(engine, resumed, process)
    pad_id, batch_size, held_out = tokenizer.pad_token_id, 2 * config.optimisation.micro_batch_size, data.held_out
    evaluator = None if held_out is None else Evaluator(held_out, pad_id, batch_size, process)
    probe = Probe(data.few if held_out is None else held_out, pad_id, batch_size, process)
    saver = Saver(folder / "checkpoints", config, process, data.described)
    if process.is_main:
        _announce(model, config, process, first_step, total_steps)
    return Trainer(config, engine, data.training, evaluator, probe, pad_id, process, saver, first_step, total_steps)


def number_of_steps(o: Optimisation, examples: int) -> int:
    """Optimizer steps of the whole run."""
    if o.max_steps is not None:
        return o.max_steps
    assert o.epochs is not None  # one of them is given, the config's check says
    return max(1, math.ceil(o.epochs * examples / o.global_batch_size))


def _prepare_folder(folder: Path, config: Config, resumed: Path | None) -> None:
    """Make the run's folder; a former run in it is moved aside, unless this one goes on with it. Then only checkpoints later
    than the one it goes on from are, which are damaged or not wanted."""
    # By what they are, not by how they are spelled: one may be relative, or a link.
    if resumed is not None and resumed.resolve().parent == (folder / "checkpoints").resolve():
        for later in newest(folder):
            if later.name > resumed.name:
                aside = later.with_name(f"unused_{later.name}")
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)
        point_to(resumed)
    elif (folder / "config.yaml").exists():
        number = next(n for n in range(1, 10**6) if not Path(f"{folder}.{n}").exists())
        os.rename(folder, f"{folder}.{number}")
        tqdm.write(f"the former run in {folder} is now in {folder}.{number}")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.yaml", dump_config(config))


def _announce(model: PeftModel, config: Config, process: Process, first_step: int, total_steps: int) -> None:
    trainable = sum(
        element_count(parameter) * (config.parallelism.ep_size if is_expert_tensor(name) else 1)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    p, accumulation = config.parallelism, accumulation_steps(config, process.world_size)
    tqdm.write(
        f"{process.world_size} rank(s) on {process.device.type}, {p.deepspeed}, ep_size {p.ep_size}, {p.precision}: "
        f"{trainable:,} trainable parameters; steps {first_step + 1} to {total_steps}, {accumulation} "
        f"micro-batch(es) each"
    )
