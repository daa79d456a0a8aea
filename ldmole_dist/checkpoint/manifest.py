"""Manifest of a checkpoint: the run that wrote it, its parameters, and the size and hash of every file."""

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
        step: number of optimizer steps done.
        topology: zero_stage, ep_size and world_size of the run that wrote the checkpoint.
        shapes: name of a trainable parameter -> its full shape; that of an expert tensor covers the experts of all ranks.
        adapter_keys: parameter name -> key in an adapter file.
        training: counters, scheduler state, loss scale, L1 coefficient and Adam step count (`engine.training_state`).
        data: values that determine the order of the examples (`data.batches.describe_order`).
        backbone: "path" and "fingerprint" (`fingerprint`) of the backbone.
        config: config of the run.
        files: size and hash of every other file in the folder, by name.
        dtype: dtype of master weights and Adam moments.
        format_version: version of the checkpoint format.
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
        """Return the content of `manifest.json`: all fields, and their hash under "sha256"."""
        plain = asdict(self) | {"files": {n: d._asdict() for n, d in self.files.items()}}
        return json.dumps(plain | {"sha256": _own_hash(plain)}, indent=1)

    def required_files(self) -> list[str]:
        """Return the names of the files that the checkpoint must have: all in `files`, and one rank file for each rank."""
        return list(dict.fromkeys([*self.files, *self.rank_files()]))

    def rank_files(self) -> list[str]:
        """Return the names of the files that hold the optimizer state, in rank order of the run that wrote them."""
        return [f"rank_{rank:05d}.safetensors" for rank in range(self.topology["world_size"])]


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint and check its own hash.

    Raises:
        UserError: if the manifest is missing or damaged, or has another format version.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text())
        version, expected = int(raw["format_version"]), raw.pop("sha256", None)
    except FileNotFoundError as error:
        raise UserError(
            f"{checkpoint} is not a complete checkpoint: it has no {MANIFEST_NAME}; use another checkpoint"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); restore it or use another checkpoint") from error
    if version != FORMAT_VERSION:
        remedy = (
            "upgrade ldmole_dist"
            if version > FORMAT_VERSION
            else "export its adapter with the ldmole_dist version that wrote it"
        )
        raise UserError(f"{path} has format {version}, but this version reads format {FORMAT_VERSION}; {remedy}")
    if _own_hash(raw) != expected:
        raise UserError(f"{path} was changed after it was written: its sha256 differs; use another checkpoint")
    manifest = Manifest(**raw)
    manifest.files = {name: Digest(**digest) for name, digest in raw["files"].items()}
    return manifest


def verify(checkpoint: Path) -> list[str]:
    """Return a description of each problem of a checkpoint; empty if it is intact.

    The content of the rank files is checked only if `file_problems` finds nothing.

    Raises:
        UserError: as in `read_manifest` and `content_problems`.
    """
    manifest = read_manifest(checkpoint)
    return file_problems(checkpoint, manifest, manifest.required_files()) or content_problems(checkpoint, manifest)


def file_problems(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return one description per file that is missing, cannot be read, is not in the manifest, or has another size or hash.

    Args:
        checkpoint: folder of the checkpoint.
        manifest: manifest of the checkpoint.
        names: names of the files to check.
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
    """Check that the rank files hold each element of the optimizer state exactly once.

    Returns:
        A description of the first bad elements of each tensor that has any: missing, stored twice or beyond the tensor's end.

    Raises:
        UserError: if a rank file cannot be opened, or its header is damaged or has no offsets.
    """
    with ShardReader(checkpoint / name for name in manifest.rank_files()) as reader:
        gaps = [
            reader.find_gap(f"{state}/{name}", math.prod(shape))
            for name, shape in manifest.shapes.items()
            for state in STATES
        ]
    return [f"{checkpoint}: {gap}" for gap in gaps if gap is not None]


def fingerprint(backbone: str) -> str | None:
    """Return a hash of the weights in a backbone folder; None if it has no safetensors files, as for a name on the hub.

    The hash covers the name, the size, and the first and last MiB of each safetensors file, because reading complete files is
    slow. Weights that differ only between the first and the last MiB of a file have the same hash.
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
