"""Backbones by name: the facts of their published configs that decide what they need, kept with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ldmole_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """All of them, by size as their names say it."""

    def size(name: str) -> float:
        number = name.rsplit("-", 1)[1]
        return float(number[:-1]) * {"M": 1e6, "B": 1e9}[number[-1]]

    return sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda name: (size(name), name))


def load_backbone_config(name_or_path: str) -> PretrainedConfig:
    """Of a preset, a config.json, or a folder that holds one.

    Raises:
        UserError: where it is none of them, or not the config of a model.
    """
    from transformers import AutoConfig  # takes its time, and the command line only wants the names

    path = FOLDER / f"{name_or_path}.json"
    if not path.is_file() or "/" in name_or_path:
        path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"--backbone {name_or_path!r} is neither a config.json, nor a folder with one, nor one of {preset_names()}"
        )
    try:
        return AutoConfig.for_model(**json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--backbone: {path} is not the config of a model that transformers knows: {reason}") from error
