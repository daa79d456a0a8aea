"""Export of the adapter as an ordinary PEFT folder, from a model in training or from a checkpoint.

Either export holds one full tensor in memory at a time. Exporting a checkpoint needs no process group.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ldmole_dist.checkpoint.files import ShardReader, TensorSpec, write_tensors
from ldmole_dist.checkpoint.manifest import read_manifest, verify
from ldmole_dist.cluster.heartbeat import heartbeat
from ldmole_dist.distributed import Process, raise_on_all_ranks
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.optimizer_state import full_shapes
from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_folder, publish_folder, start_folder, sync, unfinished_folder, write_errors
from ldmole_dist.tuner.model import tuner_of
from ldmole_dist.tuner.state_dict import adapter_keys

METADATA = {"format": "pt"}  # metadata that PEFT writes to a safetensors file


def write_adapter_config(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json as PEFT does and sync it to disk."""
    config = copy.copy(model.active_peft_config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    sync(folder / CONFIG_NAME)


def export_adapter(engine: Engine, folder: Path, process: Process) -> None:
    """Write the adapter of a model in training, with the experts of all ranks.

    Collective: every rank must call it; rank 0 writes. The write is atomic: the folder is complete or absent. An existing
    adapter is replaced.

    Args:
        engine: engine that holds the model.
        folder: folder of the adapter.
        process: this rank.

    Raises:
        UserError: on rank 0, if the folder cannot be written.
        PeerError: on the other ranks in that case.
    """
    heartbeat("writing the adapter")
    tuner, keys = tuner_of(engine.module), adapter_keys(engine.module)
    shapes = full_shapes(engine, frozen_experts=True)
    parameters = {n: p for n, p in engine.module.named_parameters() if n in shapes}
    unfinished = unfinished_folder(folder)
    with raise_on_all_ranks("preparing the adapter's folder"), write_errors(f"the adapter {folder}"):
        if process.is_main:
            start_folder(folder)
            write_adapter_config(engine.module, unfinished)
    specs = [TensorSpec(keys[name], shapes[name], p.dtype) for name, p in parameters.items()]
    gathered = (tuner.full_parameter(name, parameter) for name, parameter in parameters.items())
    write_error: Exception | None = None
    if process.is_main:
        try:
            write_tensors(unfinished / SAFETENSORS_WEIGHTS_NAME, specs, gathered, METADATA)
        except Exception as error:  # raised below, after the collectives that the other ranks wait in
            write_error = error
    # Gathering is collective: the other ranks only take part in it, and rank 0 must complete it after a write error.
    for _ in gathered:
        pass
    with raise_on_all_ranks("writing the adapter"), write_errors(f"the adapter {folder}"):
        if write_error is not None:
            raise write_error
        if process.is_main:
            publish_folder(folder, replace=True)


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the adapter of a checkpoint to a new folder.

    Raises:
        UserError: if the checkpoint is missing or damaged or does not hold the experts, or the folder exists or cannot be
            written.
    """
    manifest = read_manifest(checkpoint)
    if problems := verify(checkpoint):
        raise UserError(f"{problems[0]}; restore the checkpoint or export another one")
    if folder.exists():
        raise UserError(f"{folder} already exists; remove it or choose another folder")
    if json.loads((checkpoint / CONFIG_NAME).read_text()).get("train_experts") is False:
        raise UserError(
            f"{checkpoint} does not hold the experts, because its run did not train them; use the complete adapter in the "
            "folder adapter/ of the run; if the run has not finished, resume it first"
        )
    specs = [TensorSpec(manifest.adapter_keys[n], shape, torch.float32) for n, shape in manifest.shapes.items()]
    with write_errors(f"the adapter {folder}"), atomic_folder(folder) as unfinished:
        shutil.copyfile(checkpoint / CONFIG_NAME, unfinished / CONFIG_NAME)
        with ShardReader(checkpoint / name for name in manifest.rank_files()) as reader:
            values = (reader.read_tensor(f"master/{name}", shape) for name, shape in manifest.shapes.items())
            write_tensors(unfinished / SAFETENSORS_WEIGHTS_NAME, specs, values, METADATA)
