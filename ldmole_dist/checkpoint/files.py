"""Tensor files of checkpoints and adapters: written and hashed one tensor at a time; shards are read back by flat range.

The files are ordinary safetensors files. The safetensors library can write a file only from tensors that are all in memory,
so `write_tensors` implements the format itself. In a checkpoint, a shard is a flat tensor under the key "STATE/PARAMETER"; its
offset in the flattened full parameter is in the file's metadata.
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

# dtype -> name in the safetensors format.
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.float64: "F64",
}


class TensorSpec(NamedTuple):
    """Key, shape and dtype of a tensor to write.

    The file starts with a header of all specs, so they must be known before the first tensor is written.
    """

    key: str
    shape: Sequence[int]
    dtype: torch.dtype


def write_tensors(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> Digest:
    """Write a safetensors file one tensor at a time, sync it to disk, and return its size and hash.

    Args:
        path: path of the file.
        specs: specs of all tensors.
        tensors: tensors in the order of `specs`, on any device. Each is requested after the previous one is written.
        metadata: metadata to store in the file.

    Raises:
        OSError: if the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, shape, dtype in specs:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in [len(text).to_bytes(8, "little"), text]:
            digest.update(data)
            file.write(data)
        for spec, tensor in zip(specs, tensors, strict=True):
            assert tensor.dtype == spec.dtype and list(tensor.shape) == list(spec.shape), spec.key
            # Viewed as bytes, because numpy has no bfloat16.
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(values)
            file.write(values)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return Digest(size, digest.hexdigest())


class ShardReader:
    """Reader of flattened tensors whose shards are in several files.

    As a context manager, the reader closes the files at the end of the block.

    Args:
        paths: rank files of a checkpoint.

    Raises:
        UserError: if a file cannot be opened, or its header is damaged or has no offsets.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stack = ExitStack()
        # Key -> (start, end, file) of each shard, sorted by start.
        self._shards: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
                for key, start in json.loads((file.metadata() or {})["starts"]).items():
                    (length,) = file.get_slice(key).get_shape()
                    self._shards[key].append((start, start + length, file))
            except Exception as error:  # SafetensorError, KeyError, ValueError or OSError, depending on the damage
                self._stack.close()
                reason = "its metadata has no offsets" if isinstance(error, KeyError) else error
                raise UserError(
                    f"checkpoint file {path} cannot be read ({reason}); restore it or use another checkpoint"
                ) from error
        for shards in self._shards.values():
            shards.sort(key=lambda shard: shard[:2])

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read_tensor(self, key: str, shape: Sequence[int]) -> Tensor:
        """Return a full tensor in float32; elements that no shard holds are NaN."""
        flat = torch.full((math.prod(shape),), torch.nan)
        for position, value in self.read_range(key, 0, len(flat)):
            flat[position : position + len(value)] = value
        return flat.view(*shape)

    def read_range(self, key: str, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the values of elements `start` to `end` - 1 of a flattened tensor, shard by shard; skip elements of no shard.

        Yields:
            Position of a shard's first value relative to `start`, and the shard's values in the range.
        """
        for first, last, file in self._shards[key]:
            low, high = max(first, start), min(last, end)
            if low < high:
                yield low - start, file.get_slice(key)[low - first : high - first]

    def find_gap(self, key: str, length: int) -> str | None:
        """Describe the first error in the shards of a tensor: elements are missing, stored twice or beyond the tensor's end.

        Args:
            key: key of the tensor.
            length: number of elements of the full tensor.

        Returns:
            Description of the error; None if the shards hold every element exactly once.
        """
        reached = 0
        for start, end, _ in self._shards.get(key, []):
            if start != reached:
                return f"{key}: elements {min(start, reached)} to {max(start, reached) - 1} are " + (
                    "missing" if start > reached else "stored twice"
                )
            reached = end
        return None if reached == length else f"{key}: the shards hold {reached} elements instead of {length}"
