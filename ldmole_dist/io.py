"""Files that survive a crash: written in full and synchronised to disk, with size and hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ldmole_dist.errors import UserError

HASHED_AT_ONCE = 16 * 2**20


class Digest(NamedTuple):
    """Of a whole file."""

    bytes: int
    sha256: str


def digest_of(path: Path) -> Digest:
    """Size and hash of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASHED_AT_ONCE):
            digest.update(data)
    return Digest(path.stat().st_size, digest.hexdigest())


def write_text(path: Path, text: str) -> Digest:
    """Write a small file and see it onto the disk."""
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def sync(path: Path) -> None:
    """See a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """An error of the file system within it becomes one that names `what`, which could not be written, and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written: {error.strerror or error}; what was there before is as it was; make room or "
            "permissions there, or choose another folder, and start the same command again"
        ) from error
