"""Files of a checkpoint: tensors streamed to disk and hashed on the way, and read back in stretches.

The format is safetensors, which any tool opens. The library writes only what is in memory all at once; here one tensor is at a
time. A stretch is a flat tensor under the key "kind/parameter name"; where it begins in the flattened parameter is in the
file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ldmole_dist.errors import UserError
from ldmole_dist.io import Digest

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.float64: "F64"}


class Entry(NamedTuple):
    """A tensor to be written: its shape and dtype are known before it is."""

    key: str
    shape: Sequence[int]
    dtype: torch.dtype




def write_tensors(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], metadata: dict[str, str]) -> Digest:
    """Write a safetensors file, one tensor at a time, and see it onto the disk.

    Args:
        path: of the file.
        entries: what it will hold.
        tensors: in the order of `entries`, on any device; each is let go of before the next is asked for.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, shape, dtype in entries:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in [len(text).to_bytes(8, "little"), text]:
            digest.update(data)
            file.write(data)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert tensor.dtype == entry.dtype and list(tensor.shape) == list(entry.shape), entry.key
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(values)
            file.write(values)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return Digest(size, digest.hexdigest())










class Stretches:
    """The flattened whole of every tensor whose stretches are in some files; a context manager that holds them open.

    Args:
        paths: of the files.

    Raises:
        UserError: where one cannot be opened.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stack = ExitStack()
        # key -> (start, end, file), sorted by start
        self._where: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
                for key, start in json.loads((file.metadata() or {})["starts"]).items():
                    (length,) = file.get_slice(key).get_shape()
                    self._where[key].append((start, start + length, file))
            except Exception as error:  # safetensors raises its own of many kinds
                self._stack.close()
                raise UserError(f"checkpoint file {path} cannot be read: {error}") from error
        for where in self._where.values():
            where.sort(key=lambda stretch: stretch[:2])

    def __enter__(self) -> Stretches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def keys(self) -> Iterable[str]:
        """What there are stretches of."""
        return self._where.keys()

    def whole(self, key: str, shape: Sequence[int]) -> Tensor:
        """A whole tensor, in float32; what is missing is no number."""
        flat = torch.full((math.prod(shape),), torch.nan)
        for position, value in self.read(key, 0, len(flat)):
            flat[position : position + len(value)] = value
        return flat.view(*shape)

    def gap(self, key: str, length: int) -> str | None:
        """What is wrong with the stretches of a tensor of `length` elements: a hole, an overlap; None if nothing."""
        reached = 0
        for start, end, _ in self._where.get(key, []):
            if start != reached:
                return f"{key}: elements {min(start, reached)} to {max(start, reached)} are " + (
                    "missing" if start > reached else "there twice"
                )
            reached = end
        return None if reached == length else f"{key}: {reached} of {length} elements are there"

    def read(self, key: str, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """(position relative to `start`, what is there) until all of start .. end is given."""
        for first, last, file in self._where[key]:
            low, high = max(first, start), min(last, end)
            if low < high:
                yield low - start, file.get_slice(key)[low - first : high - first]
