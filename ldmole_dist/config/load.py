"""Read a run config from YAML, apply overrides, check it, and write it back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ldmole_dist.config.checks import check_config
from ldmole_dist.config.explain import did_you_mean, explain, key_names, subsection
from ldmole_dist.config.schema import Config
from ldmole_dist.errors import UserError


def load_config(path: str, overrides: list[str]) -> Config:
    """Read the config of a run from a YAML file, apply overrides and check the result.

    Args:
        path: path of the YAML file.
        overrides: assignments "section.key=value" with the value in YAML. The section may be left out if only one section has
            the key.

    Raises:
        UserError: if the file cannot be read or is not YAML; for the other reasons, see `make_config`.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}; correct the file") from error
    return make_config(raw, overrides, path)


def make_config(raw: Any, overrides: list[str], path: str) -> Config:
    """Apply overrides to a parsed config, check it and return it as a `Config`.

    Args:
        raw: content of the parsed YAML file; modified in place, because overrides are written to `raw`.
        overrides: assignments "section.key=value", as in `load_config`.
        path: path of the YAML file, used in error messages.

    Raises:
        UserError: if `raw` is not a mapping, an override is malformed or its section is ambiguous, a key is unknown, a value is
            missing, has a wrong type or is out of range, or `check_config` raises it.
    """
    if not isinstance(raw, dict):
        raise UserError(
            f"config {path} must be a mapping with the sections {key_names(Config)}, not {raw!r:.80}; correct the file"
        )
    for override in overrides:
        _apply_override(raw, override)
    try:
        config = TypeAdapter(Config).validate_python(raw)
    except ValidationError as error:
        raise UserError(f"config {path}: {explain(error, Config)}") from error
    check_config(config)
    return config


def dump_config(config: Config) -> str:
    """Return a config as YAML text that `load_config` can read."""
    return yaml.safe_dump(plain_config(config), sort_keys=False)


def plain_config(config: Config) -> dict[str, Any]:
    """Return a config as nested dictionaries and lists, as in the YAML file."""
    plain: dict[str, Any] = _without_tuples(asdict(config))
    return plain


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    *sections, name = key.split(".")
    if not found or not all([*sections, name]):
        raise UserError(
            f"override {override!r} does not have the form section.key=value; write, for example, run.seed=1"
        )
    if not sections and name not in key_names(Config):
        sections = [section for section in key_names(Config) if name in key_names(subsection(Config, [section]))]
        if len(sections) != 1:
            known = [key for section in key_names(Config) for key in key_names(subsection(Config, [section]))]
            reason = (
                f"several sections have this key; use {' or '.join(f'{section}.{override}' for section in sections)}"
                if sections
                else f"no section has a key {name!r}; {did_you_mean(name, known)}"
            )
            raise UserError(f"override {override!r}: {reason}")
    target = raw
    for section in sections:
        if target.get(section) is None:  # missing, or empty in the file
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise UserError(f"override {override!r}: {section!r} is a value, not a section; give section.key=value")
    try:
        target[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML; quote special characters") from error


def _without_tuples(value: Any) -> Any:
    """Return a copy with lists in place of tuples, because `yaml.safe_dump` cannot write tuples."""
    if isinstance(value, dict):
        return {key: _without_tuples(item) for key, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, list | tuple) else value
