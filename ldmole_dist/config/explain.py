"""Convert validation errors of pydantic to messages that name the key of a config."""

from __future__ import annotations

import difflib
import typing
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from ldmole_dist.config.schema import Source

# Tags of the discriminated unions in the schema, which pydantic adds to the location of an error.
_TAGS = ("<number>", "<list>", "<text>")


def explain(error: ValidationError, section: Any) -> str:
    """Return one message with all errors of a validation.

    Args:
        error: error that pydantic raised.
        section: dataclass that was validated.
    """
    return "; ".join(_explain(details, section) for details in error.errors())


def key_names(section: Any) -> list[str]:
    """Return the keys of a section, given as a dataclass."""
    return [field.name for field in fields(section)]


def subsection(section: Any, path: list[str]) -> Any:
    """Return the dataclass at a path of keys below a section. A number in the path is the index of a `Source` in a list."""
    for name in path:
        section = Source if name.isdigit() else typing.get_type_hints(section)[name]
    return section


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a hint for an unknown name: the most similar known name, or all known names if none is similar."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {known}"


def _explain(details: Any, section: Any) -> str:
    path = [str(part) for part in details["loc"] if part not in _TAGS]
    key = ".".join(path)
    if details["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {key}; " + did_you_mean(path[-1], key_names(subsection(section, path[:-1])))
    if details["type"] in ("missing", "missing_argument"):
        return f"{key} is missing; set it"
    return f"{key}={details['input']!r}: {details['msg'][:1].lower()}{details['msg'][1:]}"
