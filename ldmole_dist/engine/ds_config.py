"""DeepSpeed's own JSON configs: found by name, "auto" values filled in, contradictions to the run refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from pydantic import ValidationError

from ldmole_dist.config import Config, accumulation_steps
from ldmole_dist.errors import UserError

# In a checkout, or where a wheel puts them.
_PLACES = (Path(__file__).parents[2] / "ds_configs", Path(sys.prefix) / "share" / "ldmole_dist" / "ds_configs")
SHIPPED = next((place for place in _PLACES if place.is_dir()), _PLACES[0])


def load_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read a DeepSpeed config.

    Args:
        name_or_path: "zero2" for the shipped ds_configs/zero2.json, or the path of any JSON file.

    Raises:
        UserError: where there is none, or it is not JSON, or its stage is not 0 to 3.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = SHIPPED / f"{name_or_path}.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        shipped = sorted(p.stem for p in SHIPPED.glob("*.json"))
        raise UserError(
            f"parallelism.deepspeed={name_or_path!r}: {error.strerror} ({path}); "
            f"give one of {shipped} or the path of a JSON file"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"parallelism.deepspeed: {path} is not JSON: {error}") from error
    if stage_of(config) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage={stage_of(config)} must be 0, 1, 2 or 3")
    return config


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config; 0 where it names none."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def resolve_ds_config(
    config: dict[str, Any],
    *,
    micro_batch_size: int,
    accumulation: int,
    max_grad_norm: float,
    precision: str,
    ep_size: int,
) -> dict[str, Any]:
    """A complete config for `Engine`: every "auto" replaced, and what it relies on set.

    Args:
        config: as read.
        micro_batch_size: of one rank and forward.
        accumulation: micro-batches of an optimizer step.
        max_grad_norm: 0 for none.
        precision: "fp32", "bf16" or "fp16" (trainable parameters are float32 in every one: docs/train.md).
        ep_size: ranks that share one copy of the experts.

    Raises:
        UserError: where the file sets something that the run config sets otherwise, or that breaks experts.
    """
    filled = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
    }
    config = json.loads(json.dumps(config))
    for key, value in filled.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f'the DeepSpeed config sets {key}={config[key]} and the run config says {value}: write "auto" in the former'
            )
        config[key] = value
    zero = config.setdefault("zero_optimization", {})
    stage = stage_of(config)
    half = {section: config.pop(section, {}) for section in ("bf16", "fp16")}
    for section, settings in half.items():
        if settings.get("enabled", "auto") not in ("auto", False, precision == section):
            raise UserError(f"the DeepSpeed config enables {section}: set parallelism.precision instead")
    for section in ("optimizer", "scheduler", "elasticity", "torch_autocast"):
        if section in config:
            raise UserError(f"the DeepSpeed config has a section {section!r}, which the run config decides: remove it")
    if zero.get("zero_hpz_partition_size", 1) > 1 and ep_size > 1:
        raise UserError("zero_hpz_partition_size does not work with ep_size > 1 in this DeepSpeed: remove one of them")
    optimizer_offload = zero.get("offload_optimizer", {})
    for section in (optimizer_offload, zero.get("offload_param", {})):
        if section.get("device") == "nvme":
            raise UserError("offload to nvme is not supported: checkpoints would miss what is there; offload to cpu")
    if optimizer_offload.get("ratio", 1.0) < 1:
        raise UserError(
            "zero_optimization.offload_optimizer.ratio < 1 is not supported: checkpoints would miss moments"
        )
    if zero.get("mics_shard_size", -1) > 0:
        raise UserError("zero_optimization.mics_shard_size is not supported with checkpoints of pieces: remove it")
    if zero.get("compute_grad_norm", True) is False:
        raise UserError(
            "zero_optimization.compute_grad_norm=false would let gradients that are no numbers pass: remove it"
        )
    if precision == "fp16":
        _check_fp16(half["fp16"])
        if stage == 0:
            raise UserError("fp16 needs ZeRO stage 1, 2 or 3, which scale the loss: choose parallelism.deepspeed=zero1")
        config["fp16"] = half["fp16"] | {"enabled": True}
    elif stage == 0:
        # Done by `clip_local_gradients`: DeepSpeed's gets experts wrong at this stage.
        config["gradient_clipping"] = 0.0
    # torch's AdamW is the default optimizer: DeepSpeed's own need a compiler on the machine.
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config["steps_per_print"] = 10**12
    return config


def _check_fp16(section: dict[str, Any]) -> None:
    try:
        settings = DeepSpeedFP16Config(**section | {"enabled": True})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"the DeepSpeed config: fp16.{where}: {first['msg']}") from error
    for key in ("auto_cast", "fp16_master_weights_and_grads"):
        if getattr(settings, key):
            raise UserError(f"the DeepSpeed config sets fp16.{key}, which this engine does not do: remove it")


def resolve_run(config: Config, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed config of a run on `world_size` ranks.

    Raises:
        UserError: see `load_ds_config`, `resolve_ds_config` and `accumulation_steps`.
    """
    return resolve_ds_config(
        load_ds_config(config.parallelism.deepspeed),
        micro_batch_size=config.optimisation.micro_batch_size,
        accumulation=accumulation_steps(config, world_size),
        max_grad_norm=config.optimisation.max_grad_norm,
        precision=config.parallelism.precision,
        ep_size=config.parallelism.ep_size,
    )
