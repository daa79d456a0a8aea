"""The config of a backbone, by name or from a file, and the refusal of those that cannot be planned for.

Presets are the facts of published configs that decide what a model needs, kept with the package.
"""

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
    """All of them, by size as their names say it."""

    def size(name: str) -> float:
        number = name.rsplit("-", 1)[1]
        return float(number[:-1]) * {"M": 1e6, "B": 1e9}[number[-1]]

    return sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda name: (size(name), name))


def is_preset(name_or_path: str) -> bool:
    """Whether it is the name of a preset; a folder of that name is meant where it has a config.json, or is given as ./NAME."""
    return name_or_path in preset_names() and not (Path(name_or_path) / "config.json").exists()


def load_backbone_config(name_or_path: str) -> PretrainedConfig:
    """Of a preset, a config.json, or a folder that holds one.

    Raises:
        UserError: where it is none of them, cannot be read, or is not the config of a causal language model with dense layers.
    """
    from transformers import AutoConfig  # takes its time, and the command line only wants the names

    try:
        path = _file(name_or_path)
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"--backbone {name_or_path!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"--backbone: {path} is no JSON: {error}; give the config.json of a model") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"--backbone: {path} has no model_type: give the config.json of a model")
    _check_sizes(values, path)
    with building(f"--backbone: {path}"):
        config = AutoConfig.for_model(**values)
    _check_kind(config, path)
    _check_complete(config, values, path)
    return config


@contextmanager
def building(what: str) -> Iterator[None]:
    """Around what transformers makes of a config: whatever it stumbles over is for the user to put right.

    Args:
        what: is being built, to begin the message with.
    """
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise UserError(
            f"{what} cannot be built by transformers ({reason}): correct its config.json or choose another backbone"
        ) from error


def _file(name_or_path: str) -> Path:
    """The config.json that is meant."""
    path = FOLDER / f"{name_or_path}.json" if is_preset(name_or_path) else Path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
            raise _gguf(files[0])
        path = path / "config.json"
    if not path.is_file():
        names = ", ".join(preset_names())
        raise UserError(
            f"--backbone {name_or_path!r} is neither a config.json, nor a folder with one, nor one of {names}"
        )
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            raise _gguf(path)
    return path


def _gguf(path: Path) -> UserError:
    return UserError(
        f"--backbone: {path} is a GGUF file: make a model folder of it with `ldmole convert {path} FOLDER`"
    )


def _check_kind(config: PretrainedConfig, path: Path) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(
            f"--backbone: {path} is of {kind!r}, with an encoder: only decoder-only language models are planned"
        )
    if config.get_text_config() is not config:
        raise UserError(
            f"--backbone: {path} is of {kind!r}, which is more than a language model: "
            "write its text_config into a config.json of its own and give that"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"--backbone: {path} is of {kind!r}, which is no causal language model")
    if not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"--backbone: {path} is of {kind!r}, which has no attention heads: only transformers are planned"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"--backbone: {path} is of a quantised model, which is not trained on: give that of the unquantised"
        )


def _check_complete(config: PretrainedConfig, values: dict[str, Any], path: Path) -> None:
    """transformers would take the sizes of some published model for what is missing."""
    names = [name for name in SIZES if hasattr(config, name)]
    if missing := [name for name in names if not {name, config.attribute_map.get(name)} & values.keys()]:
        raise UserError(f"--backbone: {path} does not say {', '.join(missing)}: give a complete config.json")


def _check_sizes(values: dict[str, Any], path: Path) -> None:
    """Those that lead to a division by zero somewhere, or to a model that can be built and not run."""
    from transformers.activations import ACT2FN

    sizes = {
        name: values[name] for name in (*SIZES, "num_key_value_heads", "head_dim") if isinstance(values.get(name), int)
    }
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"--backbone: {path} has {name}={value}, which must be at least 1")
    heads, shared = sizes.get("num_attention_heads", 0), sizes.get("num_key_value_heads", 1)
    if heads % shared:
        raise UserError(
            f"--backbone: {path} has num_key_value_heads={shared}, which must divide num_attention_heads={heads}"
        )
    activation = values.get("hidden_act")
    if isinstance(activation, str) and activation not in ACT2FN:
        raise UserError(f"--backbone: {path} has hidden_act={activation!r}, which is not one of {', '.join(ACT2FN)}")
