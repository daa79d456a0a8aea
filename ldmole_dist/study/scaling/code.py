"""Which files decide what is measured: rows of two states of them must not be compared as if they were of one."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from ldmole_dist.engine.ds_config import SHIPPED

PACKAGE = Path(__file__).parents[2]
MEASURED_BY = (PACKAGE / "study/scaling/measure.py", PACKAGE / "study/bench/latency.py")


def code(package: Path = PACKAGE, roots: tuple[Path, ...] = MEASURED_BY, ds_configs: Path = SHIPPED) -> str:
    """A hash of what a cell runs: the modules that measure, all of ours that they import, and the DeepSpeed configs."""
    digest = hashlib.sha256()
    for path in [*sorted(imported(package, roots)), *sorted(ds_configs.glob("*.json"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def imported(package: Path, roots: tuple[Path, ...]) -> set[Path]:
    """The files of `package` that these import anywhere, functions included, and those that they import in turn."""
    found, waiting = set(), list(roots)
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += [file for name in _names(path) for file in _files(package, name)]
    return found


def _names(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # what is imported from a package may be a module of it
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _files(package: Path, name: str) -> list[Path]:
    """Of a.b.c those of a, a.b and a.b.c: importing one runs them all."""
    parts = name.split(".")
    if parts[0] != package.name:
        return []
    places = [package.parent.joinpath(*parts[:number]) for number in range(1, len(parts) + 1)]
    return [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
