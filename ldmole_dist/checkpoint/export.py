"""The portable adapter, an ordinary PEFT folder: from a model in training, or from a checkpoint without any process group.

Either way one tensor is in memory at a time.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ldmole_dist.checkpoint.files import Entry, Stretches, write_tensors
from ldmole_dist.checkpoint.manifest import read_manifest, verify
from ldmole_dist.cluster.heartbeat import heartbeat
from ldmole_dist.distributed import Process, raise_on_all_ranks
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.optimizer_state import full_shapes
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_folder, publish_folder, start_folder, sync, unfinished_folder, write_errors
from ldmole_dist.tuner.model import tuner_of
from ldmole_dist.tuner.state_dict import adapter_keys

METADATA = {"format": "pt"}


def write_adapter_config(model: PeftModel, folder: Path) -> None:
    """adapter_config.json as PEFT writes it."""
    config = copy.copy(model.active_peft_config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    sync(folder / CONFIG_NAME)


def export_adapter(engine: Engine, folder: Path, process: Process) -> None:
    """Write the adapter of a model in training, all experts in it; every rank calls it, rank 0 writes.

    It appears whole or not at all; one that was there before is replaced.
    """
    heartbeat("writing the adapter")
    keys, shapes, tuner = (
        adapter_keys(engine.module),
        full_shapes(engine, frozen_experts=True),
        tuner_of(engine.module),
    )
    unfinished = unfinished_folder(folder)
    parameters = {n: p for n, p in engine.module.named_parameters() if n in shapes}
    with raise_on_all_ranks("preparing the adapter's folder"), write_errors(f"the adapter {folder}"):
        if process.is_main:
            start_folder(folder)
            write_adapter_config(engine.module, unfinished)
    entries = [Entry(keys[name], shapes[name], p.dtype) for name, p in parameters.items()]
    gathered = (tuner.full_parameter(name, parameter) for name, parameter in parameters.items())
    failed: Exception | None = None
    if process.is_main:
        try:
            write_tensors(unfinished / SAFETENSORS_WEIGHTS_NAME, entries, gathered, METADATA)
        except Exception as error:  # of any kind: the others must be heard out before it is raised
            failed = error
    for _ in gathered:  # the others take part in gathering, and rank 0 also where it could write no more
        pass
    with raise_on_all_ranks("writing the adapter"), write_errors(f"the adapter {folder}"):
        if failed is not None:
            raise failed
        if process.is_main:
            publish_folder(folder, replace=True)


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the adapter of a checkpoint.

    Raises:
        UserError: where the checkpoint is not whole, or the folder exists or cannot be written.
    """
    manifest = read_manifest(checkpoint)
    if problems := verify(checkpoint):
        raise UserError(problems[0])
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it or choose another folder")
    if json.loads((checkpoint / CONFIG_NAME).read_text()).get("train_experts") is False:
        raise UserError(
            f"the experts of this run are frozen, so {checkpoint} does not hold them: let the run go on to its end, "
            "which writes the adapter with them"
        )
    entries = [Entry(manifest.adapter_keys[n], shape, torch.float32) for n, shape in manifest.shapes.items()]
    with write_errors(f"the adapter {folder}"), atomic_folder(folder) as unfinished:
        shutil.copyfile(checkpoint / CONFIG_NAME, unfinished / CONFIG_NAME)
        with Stretches(checkpoint / name for name in manifest.rank_files()) as stretches:
            values = (stretches.whole(f"master/{name}", shape) for name, shape in manifest.shapes.items())
            write_tensors(unfinished / SAFETENSORS_WEIGHTS_NAME, entries, values, METADATA)
