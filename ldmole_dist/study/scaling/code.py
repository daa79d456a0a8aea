"""Hash the code that a cell runs, so that rows measured with different code are not compared."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from ldmole_dist.engine.ds_config import SHIPPED

PACKAGE = Path(__file__).parents[2]
MEASURED_BY = (PACKAGE / "study/scaling/measure.py", PACKAGE / "study/bench/latency.py")


def code(package: Path = PACKAGE, roots: tuple[Path, ...] = MEASURED_BY, ds_configs: Path = SHIPPED) -> str:
    """Return a hash of the code and the DeepSpeed configs that a measurement depends on.

    Args:
        package: folder of the package.
        roots: modules that measure; all modules of `package` that they import are included.
        ds_configs: folder of the DeepSpeed configs.

    Returns:
        The first 12 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for path in [*sorted(imported(package, roots)), *sorted(ds_configs.glob("*.json"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def imported(package: Path, roots: tuple[Path, ...]) -> set[Path]:
    """Return `roots` and all files of `package` that they import, directly or indirectly, also inside functions."""
    found, waiting = set(), list(roots)
    while waiting:
        if (path := waiting.pop()) not in found:
            found.add(path)
            waiting += [file for name in _imported_names(path) for file in _files(package, name)]
    return found


def _imported_names(path: Path) -> list[str]:
    names = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Imports for type checkers never run.
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # the imported name can be a module of the package
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _files(package: Path, name: str) -> list[Path]:
    """Return the files of a, a.b and a.b.c for the module name a.b.c, because importing a.b.c runs all of them."""
    parts = name.split(".")
    if parts[0] != package.name:
        return []
    prefixes = [package.parent.joinpath(*parts[:number]) for number in range(1, len(parts) + 1)]
    return [file for path in prefixes for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
