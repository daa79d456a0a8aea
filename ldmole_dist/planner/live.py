"""Count the bytes of tensors that are alive at the same time, on any device including the meta device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of storages, from their creation by an operation until they are freed.

    Attributes:
        now: Bytes of the storages alive now.
        peak: Maximum of `now` since the mode was created, or since a caller set `peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An input that was not recorded existed before the mode. Record it with 0 bytes, so that its views add none.
        self._record((args, kwargs), counted=False)
        result = function(*args, **(kwargs or {}))
        self._record(result, counted=True)
        return result

    def _record(self, tensors: Any, counted: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if counted else 0
                if key not in self._seen:
                    self._seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
