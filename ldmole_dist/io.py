"""Crash-safe files: atomic writes of files and folders, durable appends of lines, and digests.

An atomic write creates a hidden file or folder beside the target, syncs it to disk and renames it. A crash at any moment
leaves either the complete previous content or the complete new content under the target's name. The exception is the
replacement of a folder (`publish_folder`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ldmole_dist.errors import UserError

_CHUNK_BYTES = 16 * 2**20


class Digest(NamedTuple):
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


def file_digest(path: Path) -> Digest:
    """Return the size and hash of a file, which is read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
    return Digest(path.stat().st_size, digest.hexdigest())


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk with fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_errors(what: str) -> Iterator[None]:
    """Context manager that converts an OSError into a UserError, whose message names `what` and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {what}: {error.strerror or error}. Existing content is unchanged; free disk space or fix the "
            "permissions and run the same command again, or choose another location."
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Context manager that opens a binary file, which replaces `path` if the block ends without an error.

    Symbolic links are followed. Devices and pipes, such as /dev/stdout, are written in place.

    Raises:
        OSError: if the file cannot be written; `path` is unchanged.
    """
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as file:
            yield file
        return
    # Use a random name, because several processes may write the same file at once.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)  # without it, a power failure could undo the rename


def atomic_write(path: Path, content: str | bytes) -> Digest:
    """Write a small file atomically, and return its size and hash; text is encoded as UTF-8.

    Raises:
        OSError: if the file cannot be written; `path` is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    with atomic_file(path) as file:
        file.write(data)
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def unfinished_folder(folder: Path) -> Path:
    """Return the path `.NAME` beside `folder`: the hidden folder to fill, which `publish_folder` then renames to `folder`.

    The name is the same in every process, so that several ranks can write into the folder, and so that the next attempt finds
    and removes what a killed process left.
    """
    return folder.with_name(f".{folder.name}")


def start_folder(folder: Path) -> Path:
    """Create the `unfinished_folder` of `folder`, empty and with its parents, and return its path.

    Raises:
        OSError: if it cannot be created.
    """
    unfinished = unfinished_folder(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def publish_folder(folder: Path, replace: bool = False) -> None:
    """Sync everything in the `unfinished_folder` of `folder` to disk, then rename it to `folder`.

    Args:
        folder: final path of the folder.
        replace: replace an existing `folder`. This takes two renames: a crash between them leaves the previous folder as
            `.former_NAME`.

    Raises:
        OSError: if a file cannot be synced, or `folder` exists, is not an empty folder, and `replace` is False.
    """
    unfinished, former = unfinished_folder(folder), folder.with_name(f".former_{folder.name}")
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    if replace and folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    unfinished.rename(folder)
    sync(folder.parent)
    if replace:
        shutil.rmtree(former, ignore_errors=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Context manager that yields an empty folder to fill, and renames it to `folder` if the block ends without an error.

    After an error, the yielded folder is removed. Only one process at a time may write a given folder.

    Raises:
        OSError: if the folder cannot be written, or `folder` exists and is not an empty folder.
    """
    unfinished = start_folder(folder)
    try:
        yield unfinished
        publish_folder(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the complete lines of a file, each with its line break; yield nothing if the file does not exist.

    A last line without a line break was cut off by a crash and is skipped.
    """
    if path.exists():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file and sync it to disk. An incomplete last line is removed first.

    Only one process at a time may append to a given file.

    Args:
        path: path of the file, which is created if it does not exist.
        lines: lines without line breaks.

    Raises:
        OSError: if the lines cannot be written; none of them is left in the file.
    """
    data = memoryview("".join(f"{line}\n" for line in lines).encode())
    # Open it unbuffered, because a buffered file would retry a failed write when it is closed.
    with path.open("a+b", buffering=0) as file:
        end = _complete_length(file)
        file.truncate(end)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if end == 0:
        sync(path.parent)


def read_jsonl(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines; empty if the file is missing. An incomplete last line is skipped.

    Raises:
        UserError: if a complete line is not JSON.
    """
    values = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not valid JSON ({error}); delete that line.") from error
    return values


def append_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Append values to a file of JSON lines with `append_lines`. Values that JSON cannot represent are converted with `str`."""
    append_lines(path, (json.dumps(value, ensure_ascii=False, default=str) for value in values))


def _complete_length(file: Any) -> int:
    """Return the length in bytes of the complete lines of a file, reading backwards from its end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 2**16)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        end = start
    return 0
