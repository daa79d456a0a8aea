"""The manifest of a checkpoint: what it is of, what it holds, and every file with its size and hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldmole_dist.checkpoint.files import Stretches
from ldmole_dist.errors import UserError
from ldmole_dist.io import Digest, file_digest

FORMAT_VERSION = 2
NAME = "manifest.json"
STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class Manifest:
    """See the head of this file.

    Args:
        step: optimizer steps done.
        topology: zero_stage, ep_size and world_size of the run that wrote it.
        shapes: of every trainable parameter, all experts included.
        adapter_keys: the name of each in an adapter file.
        training: what else a run needs to go on: scheduler, counters, loss scale.
        data: what the order of the examples depends on.
        backbone: path and fingerprint (`fingerprint`).
        config: of the run.
        files: every other file of the folder, with its size and hash.
        dtype: of masters and moments.
        format_version: of the folder.
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

    def text(self) -> str:
        """As it is written, with a hash of itself."""
        plain = asdict(self) | {"files": {n: d._asdict() for n, d in self.files.items()}}
        return json.dumps(plain | {"sha256": _own_hash(plain)}, indent=1)

    def all_files(self) -> list[str]:
        """Every file that there must be: those listed, and those that the topology implies."""
        return list(dict.fromkeys([*self.files, *self.rank_files()]))

    def rank_files(self) -> list[str]:
        """The files with the optimizer state."""
        return [f"rank_{rank:05d}.safetensors" for rank in range(self.topology["world_size"])]


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the form of a manifest.

    Raises:
        UserError: where there is none, or it is damaged or newer than this software.
    """
    path = checkpoint / NAME
    try:
        raw = json.loads(path.read_text())
        version, expected = raw["format_version"], raw.pop("sha256", None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read, so {checkpoint} is no whole checkpoint: {error}") from error
    if version != FORMAT_VERSION:
        newer = (
            "upgrade ldmole_dist" if version > FORMAT_VERSION else "export its adapter with the version that wrote it"
        )
        raise UserError(f"{path} is of format {version}, this software reads {FORMAT_VERSION}: {newer}")
    if _own_hash(raw) != expected:
        raise UserError(f"{path} was changed after it was written: its sha256 differs")
    manifest = Manifest(**raw)
    manifest.files = {name: Digest(**digest) for name, digest in raw["files"].items()}
    return manifest


def _own_hash(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_problems(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with some of the files, by size and hash; each says which and what."""
    problems = []
    for name in names:
        path, expected = checkpoint / name, manifest.files.get(name)
        try:
            if expected is None:
                problems.append(f"{path} is not in the manifest")
            elif path.stat().st_size != expected.bytes:
                problems.append(
                    f"{path} has {path.stat().st_size:,} bytes instead of {expected.bytes:,}: it was cut off"
                )
            elif file_digest(path).sha256 != expected.sha256:
                problems.append(f"{path} was changed after it was written: its sha256 differs")
        except FileNotFoundError:
            problems.append(f"{path} is missing")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
    return problems


def content_problems(checkpoint: Path, manifest: Manifest) -> list[str]:
    """What is missing of the optimizer state, where the files themselves are whole."""
    with Stretches(checkpoint / name for name in manifest.rank_files()) as stretches:
        found = [
            stretches.gap(f"{state}/{name}", math.prod(shape))
            for name, shape in manifest.shapes.items()
            for state in STATES
        ]
    return [f"{checkpoint}: {problem}" for problem in found if problem is not None]


def verify(checkpoint: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; empty if it is whole.

    Raises:
        UserError: where it has no manifest that can be read.
    """
    manifest = read_manifest(checkpoint)
    return file_problems(checkpoint, manifest, manifest.all_files()) or content_problems(checkpoint, manifest)


def fingerprint(backbone: str) -> str | None:
    """Of a backbone's folder: its weights' files by size and by their beginnings and ends; None for a name on the hub.

    Copies have the same, another training of the same architecture has not; terabytes need not be read for it.
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
