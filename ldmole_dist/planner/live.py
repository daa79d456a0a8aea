"""How many bytes of tensors are alive at the same time, on any device; on the meta device, how many would be."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is active, until they are freed.

    Attributes:
        now: bytes alive.
        peak: the most at a time since it became active, or since it was set to `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What an operation is given and was not made by one was there before; its views are not counted either.
        self._note((args, kwargs), counted=False)
        result = function(*args, **(kwargs or {}))
        self._note(result, counted=True)
        return result

    def _note(self, tensors: Any, counted: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), counted)

    def _add(self, storage: Any, counted: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
