"""Backbone configs, by preset name or from a file. A preset has the values of a published config that determine sizes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmole_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FOLDER = Path(__file__).parent / "presets"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def preset_names() -> list[str]:
    """Return the names of all presets, smallest model first."""

    def size(name: str) -> float:
        number = name.rsplit("-", 1)[1]
        return float(number[:-1]) * {"M": 1e6, "B": 1e9}[number[-1]]

    return sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda name: (size(name), name))


def is_preset(name_or_path: str) -> bool:
    """Return whether an argument is the name of a preset; a folder of that name with a config.json takes precedence."""
    return name_or_path in preset_names() and not (Path(name_or_path) / "config.json").exists()


def load_backbone_config(name_or_path: str) -> PretrainedConfig:
    """Return the config of a preset, of a config.json, or of a folder that contains one.

    Raises:
        UserError: If the file cannot be read or is not a valid, complete config, or the model is not a decoder-only, text-only,
            unquantized language model with attention.
    """
    from transformers import AutoConfig  # slow to import, and the argument parser only needs the preset names

    try:
        path = _file(name_or_path)
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"--backbone {name_or_path!r} cannot be read ({error.strerror or error}); give a readable file or a preset."
        ) from error
    except ValueError as error:
        raise UserError(f"--backbone: {path} is not JSON ({error}); give the config.json of a model.") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"--backbone: {path} has no model_type; give the config.json of a model.")
    _check_sizes(values, path)
    with explain_build_errors(f"--backbone: the model of {path}"):
        config = AutoConfig.for_model(**values)
    _check_kind(config, path)
    # transformers would replace a missing size with its default, that of some published model.
    names = [name for name in SIZES if hasattr(config, name)]
    if missing := [name for name in names if not {name, config.attribute_map.get(name)} & values.keys()]:
        raise UserError(f"--backbone: {path} does not contain {', '.join(missing)}; give a complete config.json.")
    return config


@contextmanager
def explain_build_errors(what: str) -> Iterator[None]:
    """Context manager that converts any exception raised in its block into a UserError.

    Args:
        what: Subject of the error message: option and model that is built.
    """
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise UserError(
            f"{what} cannot be built by transformers ({reason}); correct the config.json or choose another backbone."
        ) from error


def _file(name_or_path: str) -> Path:
    """Return the path of the preset or of the config.json; raise UserError if there is none or if the file is a GGUF file."""
    path = FOLDER / f"{name_or_path}.json" if is_preset(name_or_path) else Path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
            raise _gguf(files[0])
        path = path / "config.json"
    if not path.is_file():
        names = ", ".join(preset_names())
        raise UserError(
            f"--backbone {name_or_path!r} is neither a config.json nor a folder with one; give either, or one of {names}."
        )
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            raise _gguf(path)
    return path


def _gguf(path: Path) -> UserError:
    return UserError(
        f"--backbone: {path} is a GGUF file; convert it with `ldmole convert {path} FOLDER` and give FOLDER."
    )


def _check_kind(config: PretrainedConfig, path: Path) -> None:
    """Raise UserError if the planner does not support the kind of model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    quantization = getattr(config, "quantization_config", None)
    for unsupported, problem in (
        (config.is_encoder_decoder, "an encoder-decoder model; give a decoder-only model"),
        (
            config.get_text_config() is not config,
            "a multimodal model; save its text_config as a config.json and give that",
        ),
        (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING, "not a causal language model; give one"),
        (not hasattr(config, "num_attention_heads"), "a model without attention heads; give a transformer"),
        (quantization is not None, "a quantized model, which is not supported; give the unquantized model"),
    ):
        if unsupported:
            raise UserError(f"--backbone: the model of {path} (model_type {config.model_type!r}) is {problem}.")


def _check_sizes(values: dict[str, Any], path: Path) -> None:
    """Raise UserError for sizes and activations with which transformers cannot build the model or the model cannot run."""
    from transformers.activations import ACT2FN

    names = (*SIZES, "num_key_value_heads", "head_dim")
    sizes = {name: values[name] for name in names if isinstance(values.get(name), int)}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"--backbone: {path} has {name}={value}, which must be at least 1.")
    heads, kv_heads = sizes.get("num_attention_heads", 0), sizes.get("num_key_value_heads", 1)
    if heads % kv_heads:
        raise UserError(
            f"--backbone: {path} has num_key_value_heads={kv_heads}, which must divide num_attention_heads={heads}."
        )
    activation = values.get("hidden_act")
    if isinstance(activation, str) and activation not in ACT2FN:
        raise UserError(f"--backbone: {path} has hidden_act={activation!r}; use one of {', '.join(ACT2FN)}.")
