"""Tokenization of rows into sequences whose labels mark the tokens of the answer."""

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
    """Token ids and labels of one sequence.

    Args:
        input_ids: all token ids.
        labels: token ids of the tokens that are trained on and -100 elsewhere; for sequence classification, the class index.
            Trained on are the answer, a complete plain text, or every assistant turn of a conversation.
        domain: domain of the row (`Row.domain`).
        choices: token id of each possible answer; None for sequence classification, conversations and the result of
            `Encoder.encode_choices`, if the answers are unknown, or if one of them is not a single token.
    """

    input_ids: list[int]
    labels: list[int] | int
    domain: str | None = None
    choices: tuple[int, ...] | None = None


class Encoder:
    """Converts rows to token ids and labels.

    Args:
        tokenizer: tokenizer of the backbone.
        task: "causal_lm" or "sequence_classification".
        labels: class names for sequence_classification; for causal_lm the possible answers, one token each, or None.
        max_length: maximum number of tokens of a sequence.
        truncation: cut longer sequences: plain texts at the end, all others at the start. If False, they are an error.

    Raises:
        UserError: for causal_lm, if one of `labels` is not a single token or two of them are the same token.
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
            self._label_ids = self._single_token_ids(labels, "data.labels")

    def __call__(self, rows: Sequence[Row], progress: str, quiet: bool) -> list[Encoded]:
        """Encode all rows.

        Args:
            rows: rows to encode.
            progress: label of the progress bar.
            quiet: hide the progress bar.

        Raises:
            UserError: if a row cannot be encoded (`encode`); the message names the row.
        """
        return [self.encode(row) for row in tqdm(rows, desc=progress, disable=quiet, unit="row")]

    def encode(self, row: Row) -> Encoded:
        """Encode one row.

        Raises:
            UserError: if the row has no tokens, is too long while truncation is off, has an answer that leaves no room for the
                prompt, or has two choices that are the same token; for a conversation, also if the tokenizer has no chat
                template, or the template rejects the conversation or changes earlier turns when it adds one.
        """
        if self.task == "sequence_classification":
            assert self.labels is not None  # checked with the config
            ids, _ = self._fit([(self.tokenizer(row.source)["input_ids"], False)], row)
            return Encoded(ids, self.labels.index(row.target), row.domain)
        if row.messages:
            return Encoded(*self._fit(self._conversation(row), row), row.domain)
        parts = [(self.prompt_ids(row.source), False), (self.answer_ids(row), True)]
        return Encoded(*self._fit(parts, row), row.domain, self.choice_ids(row))

    def check(self, row: Row) -> None:
        """Check that a row can be encoded when truncation is on.

        For speed, a row is encoded only if it is a conversation, which the chat template may reject, or if its answer may leave
        no room for the prompt. Rarer errors, such as two choices that are the same token, are not found.

        Raises:
            UserError: if the row is encoded and `encode` raises it.
        """
        # A token is assumed to take at least half a byte, which leaves a margin for tokenizers that normalize the text.
        if row.messages or (row.source and 2 * len(row.target.encode()) + 2 >= self.max_length):
            self.encode(row)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, including the tokenizer's special tokens."""
        return list(self.tokenizer(prompt)["input_ids"])

    def answer_ids(self, row: Row) -> list[int]:
        """Return the token ids of the target, which are trained on.

        They end with the end-of-sequence token, except in rows whose possible answers are `labels`.
        """
        ids = self._ids(row.target)
        return ids if self.labels is not None and row.choices is None else [*ids, self.tokenizer.eos_token_id]

    def encode_choices(self, row: Row) -> list[Encoded]:
        """Return one sequence per possible answer of a row: the prompt and that answer, without an end-of-sequence token.

        Raises:
            UserError: if the task is sequence classification, the possible answers are unknown, the prompt or an answer has no
                tokens, or a sequence is too long.
        """
        if self.task != "causal_lm":
            raise UserError("--likelihood does not apply to backbone.task=sequence_classification; omit --likelihood.")
        choices = row.choices or self.labels
        if choices is None:
            raise UserError(
                f"{row.where}: --likelihood needs the possible answers of each row; add 'choices' to the rows, set the task of "
                "the source, or set data.labels."
            )
        prompt = self.prompt_ids(row.source)
        encoded = []
        for choice in choices:
            ids = self._ids(choice)
            if not ids or not prompt:
                part = f"the answer {choice!r:.60}" if prompt else "the prompt"
                raise UserError(
                    f"{row.where}: {part} has no tokens, but --likelihood needs at least one; correct the row."
                )
            encoded.append(Encoded(*self._fit([(prompt, False), (ids, True)], row), row.domain))
        return encoded

    def choice_ids(self, row: Row) -> tuple[int, ...] | None:
        """Return the token id of each possible answer of a row.

        The result is None for sequence classification and conversations, if the answers are unknown, or if one of them is not a
        single token.

        Raises:
            UserError: if two of the answers are the same token.
        """
        if self.task == "sequence_classification" or row.messages:
            return None
        if row.choices is None:
            return self._label_ids
        if any(len(self._ids(choice)) != 1 for choice in row.choices):
            return None
        return self._single_token_ids(row.choices, row.where)

    def _single_token_ids(self, answers: Sequence[str], where: str) -> tuple[int, ...]:
        known = self._known_choices.get(tuple(answers))
        if known is None:
            known = check_single_tokens(answers, [self._ids(answer) for answer in answers], where)
            self._known_choices[tuple(answers)] = known
        return known

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _conversation(self, row: Row) -> list[tuple[list[int], bool]]:
        """Return the parts of a rendered conversation, each as (token ids, whether they are trained on).

        An assistant's turn is trained on with the end-of-turn text that the template adds, but without the turn's header.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{row.where}: the row is a conversation, but the backbone's tokenizer has no chat template; use a backbone "
                "with one, or another record format."
            )
        done, parts = "", []
        for index, message in enumerate(row.messages):
            if message.role != "assistant":
                continue
            before = self._render(row, index, True)
            after = self._render(row, index + 1, False)
            if not before.startswith(done) or not after.startswith(before):
                # If an earlier assistant turn was rendered, conversations that end after their first assistant turn are usable.
                remedy = (
                    "conversations with one assistant turn" if done else "another record format, or another backbone"
                )
                raise UserError(
                    f"{row.where}: the chat template changes the text before turn {index + 1} when it adds this turn, so the "
                    f"assistant's tokens cannot be determined; use {remedy}."
                )
            parts += [(self._ids(before.removeprefix(done)), False), (self._ids(after.removeprefix(before)), True)]
            done = after
        return parts

    def _render(self, row: Row, turns: int, generation_prompt: bool) -> str:
        messages = [message._asdict() for message in row.messages[:turns]]
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except TemplateError as error:
            raise UserError(
                f"{row.where}: the chat template rejects the conversation: {error}; correct the row."
            ) from error

    def _fit(self, parts: Sequence[tuple[list[int], bool]], row: Row) -> tuple[list[int], list[int]]:
        """Return the token ids and labels of the concatenated parts.

        If truncation is on, ids and labels are cut to `max_length`: plain texts at the end, all other rows at the start.

        Raises:
            UserError: if the parts have no tokens, have more than `max_length` tokens while truncation is off, or the answer
                of a row that is not plain text leaves no room for the prompt.
        """
        ids = [i for part, _ in parts for i in part]
        labels = [i if trained else IGNORED for part, trained in parts for i in part]
        limit = self.max_length
        if len(ids) > limit and not self.truncation:
            raise UserError(
                f"{row.where}: {len(ids)} tokens exceed data.max_length={limit}; increase data.max_length, shorten the row, "
                "or set data.truncation=true."
            )
        answer_length = len(labels) - labels.count(IGNORED)
        plain_text = not row.source and not row.messages
        if not ids:
            raise UserError(f"{row.where}: the row has no tokens; remove it.")
        if answer_length >= limit and not plain_text:
            raise UserError(
                f"{row.where}: an answer of {answer_length} tokens leaves no room for the prompt within "
                f"data.max_length={limit}; increase data.max_length, or shorten the answer."
            )
        kept = slice(limit) if plain_text else slice(-limit, None)
        return ids[kept], labels[kept]


def check_single_tokens(labels: Sequence[str], ids: Sequence[Sequence[int]], where: str) -> tuple[int, ...]:
    """Return the token id of each answer.

    Args:
        labels: possible answers.
        ids: token ids of each answer.
        where: location of the answers, used in error messages.

    Raises:
        UserError: if an answer is not a single token, or two answers are the same token.
    """
    for label, tokens in zip(labels, ids, strict=True):
        if len(tokens) != 1:
            raise UserError(
                f"{where}: {label!r} is {len(tokens)} tokens for this tokenizer, but accuracy needs labels of one token; "
                "put a space before a label that follows a word, use other words, or remove data.labels."
            )
    choices = tuple(tokens[0] for tokens in ids)
    if len(set(choices)) < len(choices):
        raise UserError(
            f"{where}: two of the answers {list(labels)} are the same token for this tokenizer; use other words."
        )
    return choices
