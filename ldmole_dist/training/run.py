"""Setup of a training run from its config, and export of the trained adapter."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm

from ldmole_dist.checkpoint.export import export_adapter
from ldmole_dist.checkpoint.load import choose_checkpoint, list_checkpoints, load_checkpoint
from ldmole_dist.checkpoint.save import Saver, set_latest
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
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.model.build import build_model
from ldmole_dist.monitor.probe import Probe
from ldmole_dist.training.preemption import StopRequest
from ldmole_dist.training.trainer import Trainer
from ldmole_dist.tuner.state_dict import is_expert_tensor


def train(config: Config) -> dict[str, float]:
    """Train an adapter and write it to `adapter/` in the output folder. Collective: every rank must call it.

    Returns:
        Metrics of the final evaluation; empty without evaluation data.

    Raises:
        UserError, PeerError: on every rank, as in `prepare` and `Trainer.run`, or if the adapter cannot be written.
        NonFiniteLoss, Preempted: on every rank, as in `Trainer.run`.
    """
    trainer = prepare(config)
    result = trainer.run()
    with StopRequest():  # a stop signal must not interrupt the export, after which the run ends anyway
        export_adapter(trainer.engine, Path(config.run.output_dir) / "adapter", trainer.process)
    return result


def prepare(config: Config) -> Trainer:
    """Build the data, model, engine and trainer of a run, and load the checkpoint that the run resumes from.

    Also join the process group and create the output folder. Collective: every rank must call it.

    Raises:
        UserError, PeerError: on every rank, if the config, the data, the checkpoint, the output folder, the tokenizer, the
            backbone or the adapter is not usable.
    """
    process = start(config.parallelism.timeout_minutes)
    with raise_on_all_ranks("checking the config"):
        check_parallelism(config, process.world_size)
        ds_config = resolve_run(config, process.world_size)
        tokenizer = load_tokenizer(config.backbone.path)
    # Check data and checkpoint before the model is built, because loading a large backbone takes minutes.
    data = read_data(config, tokenizer, process)
    checkpoint = choose_checkpoint(config, data.order, process)
    folder = Path(config.run.output_dir)
    with raise_on_all_ranks("preparing the output folder"):
        if process.is_main:
            try:
                _prepare_folder(folder, config, checkpoint)
            except OSError as error:
                path = str(error.filename or folder)
                where = "" if path == str(folder) else f" ({path})"
                raise UserError(
                    f"cannot prepare run.output_dir={str(folder)!r}: {error.strerror or error}{where}; fix its permissions, "
                    "free disk space, or choose another folder"
                ) from error

    parallel = expert_parallel(config.parallelism.ep_size, config.parallelism.dispatch, config.parallelism.overlap)
    model = build_model(config, parallel, process, stage_of(ds_config), tokenizer.pad_token_id)
    total_steps = number_of_steps(config.optimisation, data.size)
    engine = Engine(model, ds_config, config.optimisation, total_steps)
    # From here on, each rank draws its own dropout masks. The initial values, drawn above, must be equal on all ranks.
    torch.manual_seed(config.run.seed * 1_000_003 + process.rank)
    first_step = 0 if checkpoint is None else load_checkpoint(engine, checkpoint, process)

    pad_id = tokenizer.pad_token_id
    batch_size = 2 * config.optimisation.micro_batch_size  # a forward without gradients needs less memory
    held_out = data.held_out
    evaluator = None if held_out is None else Evaluator(held_out, pad_id, batch_size, process)
    probe = Probe(data.sample if held_out is None else held_out, pad_id, batch_size, process)
    saver = Saver(folder / "checkpoints", config, process, data.order)
    if process.is_main:
        _print_summary(model, config, process, first_step, total_steps)
    return Trainer(config, engine, data.training, evaluator, probe, pad_id, process, saver, first_step, total_steps)


def number_of_steps(o: Optimisation, examples: int) -> int:
    """Return the number of optimizer steps of a run with `examples` training examples."""
    if o.max_steps is not None:
        return o.max_steps
    assert o.epochs is not None  # the config requires one of the two
    return max(1, math.ceil(o.epochs * examples / o.global_batch_size))


def _prepare_folder(folder: Path, config: Config, checkpoint: Path | None) -> None:
    """Create the output folder and write its config.yaml.

    If the folder holds an earlier run that is not resumed, it is first renamed to FOLDER.N with the smallest unused N. A run
    that resumes from its own `checkpoint` renames later checkpoints, which are damaged or discarded, to `unused_step_N`, and
    records `checkpoint` as the latest.
    """
    # Paths are resolved, because one of them may be relative or contain a link.
    if checkpoint is not None and checkpoint.resolve().parent == (folder / "checkpoints").resolve():
        for later in list_checkpoints(folder):
            if later.name > checkpoint.name:
                unused = later.with_name(f"unused_{later.name}")
                shutil.rmtree(unused, ignore_errors=True)
                later.rename(unused)
        set_latest(checkpoint)
    elif (folder / "config.yaml").exists():
        number = next(n for n in range(1, 10**6) if not Path(f"{folder}.{n}").exists())
        os.rename(folder, f"{folder}.{number}")
        tqdm.write(f"moved the previous run in {folder} to {folder}.{number}")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "config.yaml", dump_config(config))


def _print_summary(model: PeftModel, config: Config, process: Process, first_step: int, total_steps: int) -> None:
    trainable = sum(
        element_count(parameter) * (config.parallelism.ep_size if is_expert_tensor(name) else 1)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    p, accumulation = config.parallelism, accumulation_steps(config, process.world_size)
    tqdm.write(
        f"{process.world_size} rank(s) on {process.device.type}, {p.deepspeed}, ep_size {p.ep_size}, {p.precision}: "
        f"{trainable:,} trainable parameters; steps {first_step + 1} to {total_steps}, {accumulation} micro-batch(es) per rank"
    )
