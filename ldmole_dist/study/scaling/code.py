"""A hash of the code that a cell runs, so that rows measured with different code are not compared."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from ldmole_dist.engine.ds_config import SHIPPED

PACKAGE = Path(__file__).parents[2]
MEASURED_BY = (PACKAGE / "study/scaling/measure.py", PACKAGE / "study/bench/latency.py")


def code(package: Path = PACKAGE, roots: tuple[Path, ...] = MEASURED_BY, ds_configs: Path = SHIPPED) -> str:
    """Return a hash of the measuring modules, of all modules of `package` that they import, and of the DeepSpeed configs."""
    digest = hashlib.sha256()
    for path in [*sorted(imported(package, roots)), *sorted(ds_configs.glob("*.json"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def imported(package: Path, roots: tuple[Path, ...]) -> set[Path]:
    """Return the files of `package` that the roots import, directly or not, inside functions included, and the roots."""
    found, waiting = set(), list(roots)
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += [file for name in _imported_names(path) for file in _files(package, name)]
    return found


def _imported_names(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # a name imported from a package may be one of its modules
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _files(package: Path, name: str) -> list[Path]:
    """Return the files of a, a.b and a.b.c for the name a.b.c, since importing it runs all of them."""
    parts = name.split(".")
    if parts[0] != package.name:
        return []
    prefixes = [package.parent.joinpath(*parts[:number]) for number in range(1, len(parts) + 1)]
    return [file for path in prefixes for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
