"""Rows of the configured data sources: files, tasks, data sets on the Hugging Face Hub, and mixtures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ldmole_dist.config import Source
from ldmole_dist.data.formats import FORMATS, Format, detect_format
from ldmole_dist.data.records import LocatedRecord, read_records
from ldmole_dist.data.rows import Row
from ldmole_dist.data.tasks import TASKS
from ldmole_dist.data.tasks.choice import ChoiceTask
from ldmole_dist.data.tasks.task import Task
from ldmole_dist.errors import UserError


def as_sources(data: str | Sequence[Source]) -> list[Source]:
    """Return the sources of `data.train` or `data.eval`; a single path is one source."""
    return [Source(path=data)] if isinstance(data, str) else list(data)


def read_rows(
    data: str | Sequence[Source],
    task: str,
    labels: Sequence[str] | None,
    limit: int | None = None,
    split: str = "train",
) -> list[list[Row]]:
    """Read and check the rows of each source.

    Args:
        data: value of `data.train` or `data.eval`.
        task: "causal_lm" or "sequence_classification".
        labels: allowed targets of rows that have no choices of their own; None allows any.
        limit: maximum number of rows of each source; None reads all.
        split: "train" or "eval"; selects a task's default split on the Hub.

    Returns:
        One list of rows per source.

    Raises:
        UserError: if a source does not fit the task, cannot be read or has no rows, or if a row is invalid; the message names
            the location.
    """
    sources = as_sources(data)
    by_source = []
    for source in sources:
        parser = RowParser(source, task, labels, named=len(sources) > 1)
        rows = [parser(record, where) for record, where in islice(_records(source, split), limit)]
        if not rows:
            raise UserError(
                f"data source {source.path or source.task} has no rows; add rows to it, or use another source."
            )
        by_source.append(rows)
    return by_source


class RowParser:
    """Callable that checks a record of one source and converts it to a row.

    Args:
        source: source from the config; its name is the domain of rows that do not set their own.
        task: "causal_lm" or "sequence_classification".
        labels: allowed targets of rows that have no choices of their own; None allows any.
        named: whether a source without a name gets the name of its task or file.

    Raises:
        UserError: if the source's task or format does not fit `task`.
    """

    def __init__(self, source: Source, task: str, labels: Sequence[str] | None, named: bool) -> None:
        self.task, self.labels = task, labels
        self.name = source.name or (source.task or Path(source.path or "").stem if named else None)
        self._format: Format | None = None
        if source.task is not None:
            known: Task = TASKS[source.task]
            if known.model_task != task:
                raise UserError(
                    f"data task {known.name} needs backbone.task={known.model_task}, but the config has backbone.task={task}; "
                    "change one of them."
                )
            text_answers = isinstance(known, ChoiceTask) and source.answers == "text"
            self._format = known.text_row if text_answers else known.row  # type: ignore[attr-defined]
        elif source.format is not None:
            self._format = FORMATS[source.format]
            needed = "sequence_classification" if source.format == "classification" else "causal_lm"
            if needed != task:
                raise UserError(
                    f"data format {source.format} needs backbone.task={needed}, but the config has backbone.task={task}; "
                    "change one of them."
                )

    def __call__(self, record: Mapping[str, Any], where: str) -> Row:
        """Return the row of a record.

        If the source has neither a task nor a format, its first record determines the format.

        Raises:
            UserError: for an invalid record; the message names `where`, the reason and the remedy.
        """
        if self._format is None:
            self._format = FORMATS[detect_format(record, where, self.task)]
        row = self._format(record, where)
        if self.labels is not None and row.choices is None and row.target not in self.labels:
            if row.messages:
                raise UserError(
                    f"{row.where}: the row is a conversation, which cannot have one of data.labels={list(self.labels)} as its "
                    "answer; remove data.labels, or use another record format."
                )
            raise UserError(
                f"{row.where}: {row.target!r:.60} is not in data.labels={list(self.labels)}; correct the row or add the label."
            )
        return row if row.domain is not None or self.name is None else replace(row, domain=self.name)


def _records(source: Source, split: str) -> Iterator[LocatedRecord]:
    if source.path is not None:
        return read_records(source.path)
    assert source.task is not None  # the config requires a path or a task
    return _hub_records(TASKS[source.task], source.split, split)


def _hub_records(task: Task, split: str | None, default: str) -> Iterator[LocatedRecord]:
    """Yield the records of a task on the Hub, each with its location, from `split` or else from `task.splits[default]`."""
    import datasets  # deferred: it imports pandas, which is slow, and most runs read files

    path, config = task.hub
    name = split or task.splits[default]
    try:
        data: Any = datasets.load_dataset(path, config, split=task.hub_split or name)
    except Exception as error:  # the errors have no common base class: network, missing data set, access denied
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"data task {task.name}: cannot load {path} from the Hugging Face Hub ({reason}); check the network and `split`, "
            "or save its rows with the same columns in a .jsonl, .parquet or .csv file, and set the source to "
            f"{{task: {task.name}, path: FILE}}."
        ) from error
    if task.hub_split is not None:
        try:
            data = task.part(data, name)
        except KeyError as error:
            raise UserError(
                f"data task {task.name} has no split {name!r}; set split to train, validation or test."
            ) from error
    for number, record in enumerate(data, start=1):
        yield record, f"{path} {name}, row {number}"
