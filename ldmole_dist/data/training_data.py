"""What a rank trains on, step by step: encoded beforehand in memory, or read and encoded when a step needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from ldmole_dist.data.batches import TrainingOrder
from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.streaming import StreamedRows
from ldmole_dist.errors import UserError

MicroBatches = list[list[Encoded]]
PREFETCHED = 2  # steps that each worker is ahead


class TrainingData(Protocol):
    """Both kinds."""

    def micro_batches(self, step: int) -> MicroBatches:
        """This rank's micro-batches of an optimizer step, from 0.

        Raises:
            UserError: where a row cannot be read or encoded.
        """

    def close(self) -> None:
        """Nothing more will be asked for."""


class InMemory:
    """All examples, on every rank.

    Args:
        examples: of the training set.
        order: which of them when.
        rank: this one.
    """

    def __init__(self, examples: Sequence[Encoded], order: TrainingOrder, rank: int) -> None:
        self.examples, self.order, self.rank = examples, order, rank

    def micro_batches(self, step: int) -> MicroBatches:
        """See `TrainingData`."""
        return [[self.examples[i] for i in micro_batch] for micro_batch in self.order.micro_batches(step, self.rank)]

    def close(self) -> None:
        """See `TrainingData`."""


class Streamed:
    """Rows on the disk; the same examples at the same step whatever the number of workers.

    Args:
        rows: of the training set.
        encoder: of these.
        order: which of them when.
        rank: this one.
        workers: processes that read and encode ahead; 0: none, a step waits for its rows.
    """

    def __init__(self, rows: StreamedRows, encoder: Encoder, order: TrainingOrder, rank: int, workers: int) -> None:
        self.rows, self.encoder, self.order, self.rank, self.workers = rows, encoder, order, rank, workers
        self._ahead: Iterator[MicroBatches | UserError] | None = None
        self._next = -1

    def micro_batches(self, step: int) -> MicroBatches:
        """See `TrainingData`."""
        if self.workers == 0 or (self._ahead is not None and step != self._next):
            return self.read(step)  # a step that is looked at again
        if self._ahead is None:
            self._ahead = iter(self._loader(step))
        self._next = step + 1
        result = next(self._ahead)
        if isinstance(result, UserError):
            raise result
        return result

    def read(self, step: int) -> MicroBatches:
        """Read and encode, in this process."""
        return [
            [self.encoder.encode(self.rows.row(i)) for i in micro_batch]
            for micro_batch in self.order.micro_batches(step, self.rank)
        ]

    def close(self) -> None:
        """End the workers."""
        self._ahead = None

    def _loader(self, first: int) -> DataLoader[MicroBatches | UserError]:
        return DataLoader(
            _Steps(self),
            sampler=range(first, 1 << 62),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PREFETCHED,
            collate_fn=_as_it_is,
        )


class _Steps(Dataset[MicroBatches | UserError]):
    """A worker's errors travel as results, so that they arrive as they were said."""

    def __init__(self, data: Streamed) -> None:
        self.data = data

    def __getitem__(self, step: int) -> MicroBatches | UserError:
        try:
            return self.data.read(step)
        except UserError as error:
            return error


def _as_it_is(result: Any) -> Any:
    return result
