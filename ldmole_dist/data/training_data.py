"""Micro-batches of one rank, from examples held in memory or from rows that are read and encoded step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from ldmole_dist.data.batches import TrainingOrder
from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.streaming import StreamedRows
from ldmole_dist.errors import UserError

MicroBatches = list[list[Encoded]]
PREFETCHED_STEPS = 2  # optimizer steps that each worker prefetches


class TrainingData(Protocol):
    """Training set as the micro-batches of one rank; implemented by `InMemoryData` and `StreamedData`."""

    def micro_batches(self, step: int) -> MicroBatches:
        """Return this rank's micro-batches of an optimizer step (from 0).

        Raises:
            UserError: if a row cannot be read or encoded.
        """

    def close(self) -> None:
        """Release all resources; no method may be called afterwards."""


class InMemoryData:
    """Training set that every rank holds in memory.

    Args:
        examples: encoded training set.
        order: order of the examples.
        rank: this rank.
    """

    def __init__(self, examples: Sequence[Encoded], order: TrainingOrder, rank: int) -> None:
        self.examples, self.order, self.rank = examples, order, rank

    def micro_batches(self, step: int) -> MicroBatches:
        """See `TrainingData`."""
        return [[self.examples[i] for i in micro_batch] for micro_batch in self.order.micro_batches(step, self.rank)]

    def close(self) -> None:
        """See `TrainingData`."""


class StreamedData:
    """Training set that stays on disk. The number of workers does not change the examples of a step.

    Args:
        rows: training set.
        encoder: encoder of the rows.
        order: order of the rows.
        rank: this rank.
        workers: number of processes that read and encode in advance; 0 reads each step when it is needed.
    """

    def __init__(self, rows: StreamedRows, encoder: Encoder, order: TrainingOrder, rank: int, workers: int) -> None:
        self.rows, self.encoder, self.order, self.rank, self.workers = rows, encoder, order, rank, workers
        self._prefetched: Iterator[MicroBatches | UserError] | None = None
        self._next_step = -1

    def micro_batches(self, step: int) -> MicroBatches:
        """See `TrainingData`."""
        # The workers prefetch consecutive steps; any other step, such as a repeated one, is read in this process.
        if self.workers == 0 or (self._prefetched is not None and step != self._next_step):
            return self.read(step)
        if self._prefetched is None:
            self._prefetched = iter(self._loader(step))
        self._next_step = step + 1
        result = next(self._prefetched)
        if isinstance(result, UserError):
            raise result
        return result

    def read(self, step: int) -> MicroBatches:
        """Read and encode the micro-batches of a step in the calling process."""
        return [
            [self.encoder.encode(self.rows.row(i)) for i in micro_batch]
            for micro_batch in self.order.micro_batches(step, self.rank)
        ]

    def close(self) -> None:
        """Stop the workers."""
        self._prefetched = None

    def _loader(self, first: int) -> DataLoader[MicroBatches | UserError]:
        return DataLoader(
            _Steps(self),
            sampler=range(first, 1 << 62),  # endless: the trainer decides when to stop
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PREFETCHED_STEPS,
            collate_fn=_identity,
        )


class _Steps(Dataset[MicroBatches | UserError]):
    """Micro-batches by step, for the workers.

    A UserError is returned as a value: DataLoader would re-raise it with a traceback as its message.
    """

    def __init__(self, data: StreamedData) -> None:
        self.data = data

    def __getitem__(self, step: int) -> MicroBatches | UserError:
        try:
            return self.data.read(step)
        except UserError as error:
            return error


def _identity(result: Any) -> Any:
    return result
