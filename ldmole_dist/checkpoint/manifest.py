"""The manifest of a checkpoint: its origin, its parameters, and the size and hash of every file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldmole_dist.checkpoint.files import ShardReader
from ldmole_dist.errors import UserError
from ldmole_dist.io import Digest, file_digest

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class Manifest:
    """Content of `manifest.json`.

    Args:
        step: optimizer steps done.
        topology: zero_stage, ep_size and world_size of the run that wrote the checkpoint.
        shapes: full shape of every trainable parameter by name, all experts included.
        adapter_keys: parameter name -> key in an adapter file.
        training: remaining state of the training loop: counters, scheduler, loss scale, adaptive coefficient.
        data: what the order of the examples depends on.
        backbone: its path and fingerprint (`fingerprint`).
        config: of the run.
        files: size and hash of every other file in the folder, by name.
        dtype: of master weights and moments.
        format_version: of the folder's layout.
    """

    step: int
    topology: dict[str, int]
    shapes: dict[str, list[int]]
    adapter_keys: dict[str, str]
    training: dict[str, Any]
    data: dict[str, int | str]
    backbone: dict[str, str | None]
    config: dict[str, Any]
    files: dict[str, Digest]
    dtype: str = "float32"
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the content of `manifest.json`, which ends with a hash of the rest."""
        plain = asdict(self) | {"files": {n: d._asdict() for n, d in self.files.items()}}
        return json.dumps(plain | {"sha256": _own_hash(plain)}, indent=1)

    def required_files(self) -> list[str]:
        """Return the names of all files that must exist: those listed and those that the world size implies."""
        return list(dict.fromkeys([*self.files, *self.rank_files()]))

    def rank_files(self) -> list[str]:
        """Return the names of the files that hold the optimizer state, by rank."""
        return [f"rank_{rank:05d}.safetensors" for rank in range(self.topology["world_size"])]


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint and check its own hash.

    Raises:
        UserError: if it is missing, damaged, or of another format version.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text())
        version, expected = raw["format_version"], raw.pop("sha256", None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read, so {checkpoint} is not a complete checkpoint: {error}") from error
    if version != FORMAT_VERSION:
        remedy = (
            "upgrade ldmole_dist"
            if version > FORMAT_VERSION
            else "export its adapter with the ldmole_dist version that wrote it"
        )
        raise UserError(f"{path} has format {version}, but this version reads format {FORMAT_VERSION}; {remedy}")
    if _own_hash(raw) != expected:
        raise UserError(f"{path} was changed after it was written: its sha256 differs")
    manifest = Manifest(**raw)
    manifest.files = {name: Digest(**digest) for name, digest in raw["files"].items()}
    return manifest


def verify(checkpoint: Path) -> list[str]:
    """Return a description of everything wrong with a checkpoint; empty if it is intact.

    Raises:
        UserError: if its manifest cannot be read.
    """
    manifest = read_manifest(checkpoint)
    return file_problems(checkpoint, manifest, manifest.required_files()) or content_problems(checkpoint, manifest)


def file_problems(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return one description per file that is missing, cut off or changed, by size and hash.

    Args:
        checkpoint: folder.
        manifest: of the checkpoint.
        names: files to check.
    """
    problems = []
    for name in names:
        path, expected = checkpoint / name, manifest.files.get(name)
        try:
            if expected is None:
                problems.append(f"{path} is not listed in the manifest")
            elif path.stat().st_size != expected.bytes:
                problems.append(f"{path} has {path.stat().st_size:,} bytes instead of {expected.bytes:,}")
            elif file_digest(path).sha256 != expected.sha256:
                problems.append(f"{path} was changed after it was written: its sha256 differs")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
    return problems


def content_problems(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Return one description per tensor of the optimizer state that the rank files do not hold in full.

    Raises:
        UserError: if a rank file cannot be opened.
    """
    with ShardReader(checkpoint / name for name in manifest.rank_files()) as reader:
        gaps = [
            reader.find_gap(f"{state}/{name}", math.prod(shape))
            for name, shape in manifest.shapes.items()
            for state in STATES
        ]
    return [f"{checkpoint}: {gap}" for gap in gaps if gap is not None]


def fingerprint(backbone: str) -> str | None:
    """Return a hash that identifies the weights of a backbone folder; None for a name on the hub.

    It covers the name, the size, and the first and last MiB of each safetensors file: enough to distinguish two trainings of
    the same architecture without reading terabytes.
    """
    files = sorted(Path(backbone).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(size - 2**20, 0))
            digest.update(file.read())
    return digest.hexdigest()


def _own_hash(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
