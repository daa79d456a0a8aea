"""Rows to token ids, with the loss on answers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ldmole_dist.data.rows import Row
from ldmole_dist.errors import UserError
from ldmole_dist.objective import IGNORED


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence and its labels: ids where the answer is and -100 elsewhere, or one class; and its domain."""

    input_ids: list[int]
    labels: list[int] | int
    domain: str | None = None


class Encoder:
    """Turns rows into sequences.

    Args:
        tokenizer: of the backbone.
        task: "causal_lm" or "sequence_classification".
        labels: class names, for sequence_classification.
        max_length: tokens of a sequence.
        truncation: cut a longer prompt or text at its start; else a longer sequence is an error.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        labels: Sequence[str] | None,
        max_length: int,
        truncation: bool,
    ) -> None:
        self.tokenizer, self.task, self.labels = tokenizer, task, labels
        self.max_length, self.truncation = max_length, truncation

    def __call__(self, rows: Sequence[Row], doing: str, quiet: bool) -> list[Encoded]:
        """Encode all rows.

        Args:
            rows: to encode.
            doing: what the progress bar says.
            quiet: no progress bar.

        Raises:
            UserError: naming the row, where it is too long and may not be cut, or has no tokens.
        """
        return [self.encode(row) for row in tqdm(rows, desc=doing, disable=quiet, unit="row")]

    def encode(self, row: Row) -> Encoded:
        """One row."""
        if self.task == "sequence_classification":
            assert self.labels is not None  # checked with the config
            ids = self._fit(self.tokenizer(row.source)["input_ids"], 0, row)
            return Encoded(ids, self.labels.index(row.target), row.domain)
        prompt, answer = self.prompt_ids(row.source), self.answer_ids(row.target)
        ids = self._fit(prompt + answer, len(answer), row)
        return Encoded(ids, [IGNORED] * (len(ids) - len(answer)) + answer, row.domain)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt, special tokens of the tokenizer included."""
        return list(self.tokenizer(prompt)["input_ids"])

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of a completion: the end-of-sequence token follows it, unless completions are labels."""
        ids = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        return ids if self.labels is not None else [*ids, self.tokenizer.eos_token_id]

    def _fit(self, ids: list[int], answer_length: int, row: Row) -> list[int]:
        if len(ids) > self.max_length and not self.truncation:
            raise UserError(
                f"{row.where}: {len(ids)} tokens are more than data.max_length={self.max_length}: "
                "raise it, shorten the row, or set data.truncation=true"
            )
        if not ids or answer_length >= self.max_length:
            raise UserError(f"{row.where}: nothing is left to read beside an answer of {answer_length} tokens")
        return ids[-self.max_length :]
