"""Rows to token ids, with the loss on answers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ldmole_dist.data.rows import Row
from ldmole_dist.errors import UserError
from ldmole_dist.loss import IGNORED


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence.

    Args:
        input_ids: all of them.
        labels: ids where the answer is and -100 elsewhere, or one class.
        domain: as in `Row`.
        choices: token ids that the first token of the answer is one of, where the possible answers are known, one token each.
    """

    input_ids: list[int]
    labels: list[int] | int
    domain: str | None = None
    choices: tuple[int, ...] | None = None


class Encoder:
    """Turns rows into sequences.

    Args:
        tokenizer: of the backbone.
        task: "causal_lm" or "sequence_classification".
        labels: class names, for sequence_classification; for causal_lm the possible answers, one token each, if they are known.
        max_length: tokens of a sequence.
        truncation: cut a longer prompt at its start and a plain text at its end; else a longer sequence is an error.

    Raises:
        UserError: where one of `labels` is not one token.
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
        self._known_choices: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._label_ids: tuple[int, ...] | None = None
        if task == "causal_lm" and labels is not None:
            self._label_ids = self._one_token_each(labels, "data.labels")

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
            ids, _ = self._fit([(self.tokenizer(row.source)["input_ids"], False)], row)
            return Encoded(ids, self.labels.index(row.target), row.domain)
        if row.messages:
            return Encoded(*self._fit(self._conversation(row), row), row.domain)
        parts = [(self.prompt_ids(row.source), False), (self.answer_ids(row), True)]
        return Encoded(*self._fit(parts, row), row.domain, self.choices_of(row))

    def check(self, row: Row) -> None:
        """See that a row can be encoded, if that is in doubt: a long answer may leave no room to read, a template may refuse.

        Raises:
            UserError: where it cannot.
        """
        # No tokenizer makes many more tokens than bytes.
        if row.messages or (row.source and 2 * len(row.target.encode()) + 2 >= self.max_length):
            self.encode(row)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt, special tokens of the tokenizer included."""
        return list(self.tokenizer(prompt)["input_ids"])

    def answer_ids(self, row: Row) -> list[int]:
        """Ids of what is learnt: the end-of-sequence token follows it, unless it is one of `labels`."""
        ids = self._ids(row.target)
        return ids if self.labels is not None and row.choices is None else [*ids, self.tokenizer.eos_token_id]

    def alternatives(self, row: Row) -> list[Encoded]:
        """The prompt with each of the answers that are possible for it, without an end-of-sequence token: as many sequences as
        there are choices, for comparing their likelihoods.

        Raises:
            UserError: where none are known, or an answer has no tokens.
        """
        choices = row.choices or self.labels
        if choices is None or self.task != "causal_lm":
            raise UserError(
                f"{row.where}: no answers to compare by likelihood: rows need 'choices', the data a task or data.labels"
            )
        prompt = self.prompt_ids(row.source)
        alternatives = []
        for choice in choices:
            ids = self._ids(choice)
            if not ids or not prompt:
                raise UserError(f"{row.where}: a likelihood needs a prompt and an answer of at least one token each")
            alternatives.append(Encoded(*self._fit([(prompt, False), (ids, True)], row), row.domain))
        return alternatives

    def choices_of(self, row: Row) -> tuple[int, ...] | None:
        """See `Encoded`."""
        if self.task == "sequence_classification" or row.messages:
            return None
        if row.choices is None:
            return self._label_ids
        if any(len(self._ids(choice)) != 1 for choice in row.choices):
            return None
        return self._one_token_each(row.choices, row.where)

    def _one_token_each(self, answers: Sequence[str], where: str) -> tuple[int, ...]:
        known = self._known_choices.get(tuple(answers))
        if known is None:
            known = single_token_choices(answers, [self._ids(answer) for answer in answers], where)
            self._known_choices[tuple(answers)] = known
        return known

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _conversation(self, row: Row) -> list[tuple[list[int], bool]]:
        """Stretches of ids, and whether they are learnt: what the chat template adds for each turn of the assistant."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{row.where}: is a conversation, and the tokenizer of this backbone has no chat template: take a backbone "
                "with one, or data in another format"
            )
        done, parts = "", []
        for index, message in enumerate(row.messages):
            if message.role != "assistant":
                continue
            before = self._rendered(row, index, True)
            after = self._rendered(row, index + 1, False)
            if not before.startswith(done) or not after.startswith(before):
                raise UserError(
                    f"{row.where}: the chat template changes earlier turns when turn {index + 1} follows, so what is read and "
                    "what is learnt cannot be told apart: give conversations of one answer"
                )
            parts += [(self._ids(before.removeprefix(done)), False), (self._ids(after.removeprefix(before)), True)]
            done = after
        return parts

    def _rendered(self, row: Row, turns: int, generation_prompt: bool) -> str:
        messages = [message._asdict() for message in row.messages[:turns]]
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except TemplateError as error:
            raise UserError(f"{row.where}: the chat template refuses it: {error}") from error

    def _fit(self, parts: Sequence[tuple[list[int], bool]], row: Row) -> tuple[list[int], list[int]]:
        """All ids, and those that are learnt; cut to the greatest length, if that is allowed."""
        ids = [i for part, _ in parts for i in part]
        labels = [i if learnt else IGNORED for part, learnt in parts for i in part]
        longest = self.max_length
        if len(ids) > longest and not self.truncation:
            raise UserError(
                f"{row.where}: {len(ids)} tokens are more than data.max_length={longest}: "
                "raise it, shorten the row, or set data.truncation=true"
            )
        answer_length = len(labels) - labels.count(IGNORED)
        plain_text = not row.source and not row.messages
        if not ids or (answer_length >= longest and not plain_text):
            raise UserError(f"{row.where}: nothing is left to read beside an answer of {answer_length} tokens")
        kept = slice(longest) if plain_text else slice(-longest, None)
        return ids[kept], labels[kept]


def single_token_choices(labels: Sequence[str], ids: Sequence[Sequence[int]], where: str) -> tuple[int, ...]:
    """Token ids of answers that are one token each.

    Args:
        labels: for the message.
        ids: their token ids.
        where: they are given.

    Raises:
        UserError: naming the first that is longer, or two that are the same token.
    """
    for label, tokens in zip(labels, ids, strict=True):
        if len(tokens) != 1:
            raise UserError(
                f"{where}: {label!r} is {len(tokens)} tokens for this tokenizer, accuracy needs labels of one token: "
                "write a leading space where words follow one, choose other words, or leave data.labels out"
            )
    choices = tuple(tokens[0] for tokens in ids)
    if len(set(choices)) < len(choices):
        raise UserError(f"{where}: {list(labels)}: two of them are the same token for this tokenizer")
    return choices
