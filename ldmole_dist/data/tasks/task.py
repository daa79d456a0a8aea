"""What a task is, and how its records are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldmole_dist.data.formats import text_of
from ldmole_dist.data.rows import Row
from ldmole_dist.errors import UserError

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Task(ABC):
    """A data set and how its records become rows.

    Args:
        name: in configs.
        hub: path of the data set and name of its configuration.
        splits: those of the hub that are trained on ("train") and evaluated on ("eval").
        max_length: tokens of a sequence in the authors' runs.
        hub_split: the only split of the hub that is used, where it is cut into parts instead (`part`).
        labels: class names, in the order of the data's numbers; none for multiple choice.
    """

    name: str
    hub: tuple[str, str | None]
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "eval": "validation"})
    max_length: int = 1024
    hub_split: str | None = None
    labels: tuple[str, ...] | None = None

    @property
    def model_task(self) -> str:
        """As `backbone.task` names it."""
        return "causal_lm" if self.labels is None else "sequence_classification"

    @abstractmethod
    def row(self, record: Mapping[str, Any], where: str) -> Row:
        """Check a record and make its row.

        Raises:
            UserError: naming `where`, the column and what it needs.
        """

    def part(self, data: Any, name: str) -> Any:
        """The part "train", "validation" or "test" of a `datasets.Dataset` that has one split only: 80, 10 and 10 %, drawn
        with the authors' seed by their calls."""
        halves = data.train_test_split(test_size=0.2, seed=42)
        held_out = halves["test"].train_test_split(test_size=0.5, seed=42)
        return {"train": halves["train"], "validation": held_out["train"], "test": held_out["test"]}[name]


def texts_of(record: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of texts, from 2 to 10.

    Raises:
        UserError: where it is not that.
    """
    value = record.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{where}: needs a list of texts {key!r}, has {value!r:.60}; its keys are {sorted(record)}")
    if not 2 <= len(value) <= len(LETTERS):
        raise UserError(f"{where}: {key!r} has {len(value)} texts, from 2 to {len(LETTERS)} are possible")
    return list(value)


def number_of(record: Mapping[str, Any], key: str, below: int, where: str) -> int:
    """A whole number from 0 on, which a file may hold as text.

    Raises:
        UserError: where it is none, too large, or -1 as in a split without labels.
    """
    value = record.get(key)
    if value in (-1, "-1", ""):
        raise UserError(f"{where}: {key!r} is {value!r}: this split has no labels; take train or validation")
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise UserError(f"{where}: {key!r} must be a whole number from 0 to {below - 1}, is {value!r:.60}")
    return value


def answer_of(record: Mapping[str, Any], key: str, among: Sequence[str], where: str) -> int:
    """The place of the right answer's label among those of the options.

    Raises:
        UserError: where it is none of them, or empty as in a split without labels.
    """
    answer = text_of(record, key, where)
    if not answer:
        raise UserError(f"{where}: {key!r} is empty: this split has no labels; take train or validation")
    if answer not in among:
        raise UserError(f"{where}: {key} {answer!r} is none of the options' labels {list(among)}")
    return list(among).index(answer)
