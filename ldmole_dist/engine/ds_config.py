"""Find DeepSpeed JSON configs by name, check them, and complete them for a run.

This module imports neither DeepSpeed nor torch, so that `ldmole validate` starts quickly.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ValidationError

from ldmole_dist.config import Config, accumulation_steps
from ldmole_dist.config.explain import did_you_mean
from ldmole_dist.engine.ds_keys import DEEPSPEED_FILE, REFUSED, DeepSpeedFile
from ldmole_dist.errors import UserError

# The folder in a checkout, and the folder where a wheel installs it.
_FOLDERS = (Path(__file__).parents[2] / "ds_configs", Path(sys.prefix) / "share" / "ldmole_dist" / "ds_configs")
SHIPPED = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])


def load_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read a DeepSpeed config and check its keys, types and ranges.

    Args:
        name_or_path: a name, such as "zero2" for ds_configs/zero2.json, or the path of a file that ends in .json.

    Raises:
        UserError: if the file cannot be read or is not a JSON object, a key is unknown or not supported, or a value has a
            wrong type or is out of range.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = SHIPPED / f"{name_or_path}.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        shipped = sorted(p.stem for p in SHIPPED.glob("*.json"))
        raise UserError(
            f"parallelism.deepspeed={name_or_path!r}: {error.strerror}; set it to the path of a readable file that ends in "
            f".json, or to one of {', '.join(shipped)}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"parallelism.deepspeed: {path} is not JSON: {error}; correct the file") from error
    try:
        _check_keys(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def stage_of(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config; 0 if it sets none."""
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
    """Return a complete DeepSpeed config for `Engine`.

    Keys with the value "auto" are set from the arguments, or removed so that DeepSpeed uses its default. Keys that the engine
    depends on are overwritten.

    Args:
        config: config from `load_ds_config`; not modified.
        micro_batch_size: sequences per forward on one rank.
        accumulation: micro-batches per optimizer step.
        max_grad_norm: norm that gradients are clipped to; 0 disables clipping.
        precision: "fp32", "bf16" or "fp16" (trainable parameters are always float32: docs/train.md).
        ep_size: number of ranks that together hold all experts once.

    Raises:
        UserError: if the DeepSpeed config has an invalid key or value, contradicts the run config, or sets a value that
            experts, checkpoints, the precision or the detection of non-finite gradients do not support.
    """
    _check_keys(config)
    given = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
    }
    for key, value in given.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f'the DeepSpeed config sets {key}={config[key]}, but the run config needs {value}; set {key} to "auto" in the '
                "DeepSpeed config"
            )
    config = _without_auto(config) | given
    zero = config.setdefault("zero_optimization", {})
    stage = stage_of(config)
    half = {section: config.pop(section, {}) for section in ("bf16", "fp16")}
    for section, settings in half.items():
        if settings.get("enabled", False) not in (False, precision == section):
            raise UserError(
                f"the DeepSpeed config enables {section}, but parallelism.precision={precision}; remove the section, or set "
                f"parallelism.precision={section}"
            )
    _check_support(zero, ep_size)
    if precision == "fp16":
        if stage == 0:
            raise UserError(
                "parallelism.precision=fp16 needs a loss scale, which ZeRO stage 0 does not have; set "
                "parallelism.deepspeed=zero1"
            )
        config["fp16"] = half["fp16"] | {"enabled": True}
    elif stage == 0:
        # `Engine` clips the gradients at stage 0: DeepSpeed 0.19.8 computes the norm of experts incorrectly there.
        config["gradient_clipping"] = 0.0
    config["zero_allow_untested_optimizer"] = True
    # With the default, true, DeepSpeed rejects torch's AdamW (our default optimizer) if the optimizer state is offloaded.
    # DeepSpeed's own CPU optimizer needs a compiler.
    config["zero_force_ds_cpu_optimizer"] = False
    config["steps_per_print"] = 10**12  # the trainer prints its own progress
    return config


def resolve_run(config: Config, world_size: int) -> dict[str, Any]:
    """Return the complete DeepSpeed config of a run on `world_size` ranks.

    Raises:
        UserError: as in `load_ds_config`, `check_quantization` and `resolve_ds_config`, or if the global batch size is not a
            multiple of the micro-batch size times the world size.
    """
    ds_config = load_ds_config(config.parallelism.deepspeed)
    check_quantization(config, ds_config)
    return resolve_ds_config(
        ds_config,
        micro_batch_size=config.optimisation.micro_batch_size,
        accumulation=accumulation_steps(config, world_size),
        max_grad_norm=config.optimisation.max_grad_norm,
        precision=config.parallelism.precision,
        ep_size=config.parallelism.ep_size,
    )


def check_quantization(config: Config, ds_config: dict[str, Any]) -> None:
    """Raise UserError if ZeRO stage 3 is combined with an int8 backbone, or with another quantization and offload_param.

    Args:
        config: config of the run.
        ds_config: config from `load_ds_config`.
    """
    ds_config = _without_auto(ds_config)
    quantization = config.backbone.quantization
    if quantization is None or stage_of(ds_config) < 3:
        return
    if quantization == "int8":
        raise UserError(
            "backbone.quantization=int8 does not work with ZeRO stage 3, because bitsandbytes keeps a second reference to the "
            "8-bit weights, which are then not partitioned; set parallelism.deepspeed=zero2 or backbone.quantization=nf4"
        )
    if ds_config["zero_optimization"].get("offload_param"):
        raise UserError(
            f"backbone.quantization={quantization} is not tested with zero_optimization.offload_param at ZeRO stage 3; "
            "remove one of them"
        )


def _check_keys(config: Any) -> None:
    """Raise UserError if a key is unknown or not supported, or a value has a wrong type or is out of range."""
    if not isinstance(config, dict):
        example = '{"zero_optimization": {"stage": 2}}'
        raise UserError(f"the DeepSpeed config is {config!r:.80}; write a JSON object, such as {example}")
    if refused := next((key for key in REFUSED if _has(config, key)), None):
        raise UserError(f"the DeepSpeed config sets {refused}, which is not supported: {REFUSED[refused]}")
    try:
        DEEPSPEED_FILE.validate_python(_without_auto(config))
    except ValidationError as error:
        raise UserError(f"the DeepSpeed config: {'; '.join(map(_explain, error.errors()))}") from error


def _check_support(zero: dict[str, Any], ep_size: int) -> None:
    """Raise UserError for values of section zero_optimization that this package does not support.

    Experts, checkpoints or the detection of non-finite gradients would not work with these values.
    """
    if zero.get("zero_hpz_partition_size", 1) > 1 and ep_size > 1:
        raise UserError(
            f"zero_optimization.zero_hpz_partition_size={zero['zero_hpz_partition_size']} does not work with "
            f"parallelism.ep_size={ep_size} in DeepSpeed 0.19.8; set one of them to 1"
        )
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") == "nvme":
            raise UserError(
                f"zero_optimization.{section}.device=nvme is not supported, because checkpoints would not contain the "
                "offloaded state; set it to cpu"
            )
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio < 1:
        raise UserError(
            f"zero_optimization.offload_optimizer.ratio={ratio} is not supported, because checkpoints would not contain "
            "all Adam moments; set it to 1"
        )
    if zero.get("compute_grad_norm", True) is False:
        raise UserError(
            "zero_optimization.compute_grad_norm=false leaves non-finite gradients undetected; remove it, or set it to true"
        )


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without the keys whose value is "auto", so that DeepSpeed uses its defaults for them."""
    return {
        key: _without_auto(item) if isinstance(item, dict) else item for key, item in value.items() if item != "auto"
    }


def _has(config: dict[str, Any], key: str) -> bool:
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    return True


def _explain(details: Any) -> str:
    path = [str(part) for part in details["loc"]]
    key = ".".join(path)
    if details["type"] == "extra_forbidden":
        return f"unknown key {key}; {did_you_mean(path[-1], _known_keys(path[:-1]))}"
    return f"{key}={details['input']!r}: {details['msg'][:1].lower()}{details['msg'][1:]}"


def _known_keys(path: list[str]) -> list[str]:
    """Return the accepted keys of the section at `path`."""
    section: Any = DeepSpeedFile
    for name in path:
        hint = get_type_hints(section)[name]
        # An optional section is a union with None.
        section = next((part for part in getattr(hint, "__args__", ()) if part is not type(None)), hint)
    return list(get_type_hints(section))
