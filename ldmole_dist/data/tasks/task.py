"""Base class of the tasks, and functions that check the values of their records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldmole_dist.data.formats import describe_value, get_text
from ldmole_dist.data.rows import Row
from ldmole_dist.errors import UserError

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Task(ABC):
    """Data set of a task, and the conversion of its records to rows.

    Args:
        name: name of the task in configs.
        hub: path of the data set on the Hugging Face Hub, and its configuration name (None if it has only one).
        splits: default splits for training ("train") and evaluation ("eval").
        hub_split: split on the Hub that `part` divides into train, validation and test; None uses the Hub's own splits.
        labels: class names in the order of the class indices; None for multiple choice.
    """

    name: str
    hub: tuple[str, str | None]
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "eval": "validation"})
    hub_split: str | None = None
    labels: tuple[str, ...] | None = None

    @property
    def model_task(self) -> str:
        """Value of `backbone.task` that the task needs."""
        return "causal_lm" if self.labels is None else "sequence_classification"

    @abstractmethod
    def row(self, record: Mapping[str, Any], where: str) -> Row:
        """Return the row of a record.

        Raises:
            UserError: for an invalid record; the message names `where` and the column.
        """

    def part(self, data: Any, name: str) -> Any:
        """Divide a `datasets.Dataset` into train, validation and test (80, 10 and 10 %), and return one of them by name.

        The calls and the seed are those of the paper's code, so that the parts have the same records.

        Raises:
            KeyError: if `name` is not "train", "validation" or "test".
        """
        halves = data.train_test_split(test_size=0.2, seed=42)
        held_out = halves["test"].train_test_split(test_size=0.5, seed=42)
        return {"train": halves["train"], "validation": held_out["train"], "test": held_out["test"]}[name]


def get_texts(record: Mapping[str, Any], key: str, where: str) -> list[str]:
    """Return the list of 2 to 10 strings stored under a key.

    Raises:
        UserError: if the value is not such a list.
    """
    value = record.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise UserError(
            f"{where}: key {key!r} must hold a list of strings, {describe_value(record, key)}; correct the row."
        )
    if not 2 <= len(value) <= len(LETTERS):
        raise UserError(
            f"{where}: key {key!r} holds {len(value)} strings, but needs 2 to {len(LETTERS)}; correct the row."
        )
    return list(value)


def get_class_index(record: Mapping[str, Any], key: str, below: int, where: str) -> int:
    """Return the class index stored under a key. The stored value may be an integer or a string of digits.

    Args:
        record: record of the data set.
        key: key of the class index.
        below: number of classes.
        where: location of the record, used in error messages.

    Raises:
        UserError: if the value is not a class index; also if it is -1 or empty, as in splits without labels.
    """
    value = record.get(key)
    if value in (-1, "-1", ""):
        raise UserError(
            f"{where}: {key!r} is {value!r}, so this split has no labels; use the train or validation split."
        )
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise UserError(
            f"{where}: key {key!r} must hold an integer from 0 to {below - 1}, {describe_value(record, key)}; correct the row."
        )
    return value


def get_answer_index(record: Mapping[str, Any], key: str, among: Sequence[str], where: str) -> int:
    """Return the index of the correct answer's label among the labels of the options.

    Args:
        record: record of the data set.
        key: key of the correct answer's label.
        among: labels of the options.
        where: location of the record, used in error messages.

    Raises:
        UserError: if the label is not a string, or no option has it; also if it is empty, as in splits without labels.
    """
    answer = get_text(record, key, where)
    if not answer:
        raise UserError(f"{where}: {key!r} is empty, so this split has no labels; use the train or validation split.")
    if answer not in among:
        raise UserError(
            f"{where}: {key} {answer!r} is not among the labels of the options, {list(among)}; correct the row."
        )
    return list(among).index(answer)
