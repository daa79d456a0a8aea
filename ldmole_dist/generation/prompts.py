"""Prompts from a file, and the resumable output file of their generated texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ldmole_dist.data.formats import ROLES
from ldmole_dist.data.records import LocatedRecord, read_records
from ldmole_dist.errors import UserError
from ldmole_dist.io import append_jsonl, read_jsonl, write_errors

Messages = list[dict[str, str]]


class Prompt(NamedTuple):
    """Input text of the model, and the record that it was read from.

    Args:
        text: input of the model.
        templated: whether a chat template rendered the text.
        record: record that the prompt was read from; None for a prompt that is not from a file.
    """

    text: str
    templated: bool = False
    record: dict[str, Any] | None = None


def read_prompts(path: str, tokenizer: PreTrainedTokenizerBase, chat: bool, system: str | None) -> list[Prompt]:
    """Return the prompts of a file, in the order of the file.

    A .txt file has one prompt per line; blank lines are skipped. Records in other files (`read_records`) have a
    "prompt" string or a "messages" list; if a record has both, "messages" is used.

    Args:
        path: path of the file.
        tokenizer: tokenizer whose chat template renders messages.
        chat: treat each line or "prompt" as a user message.
        system: system message before each of these user messages; None for none.

    Raises:
        UserError: if the file cannot be read or has no prompts, a record has neither key or a value of a wrong type, or
            `render_chat` raises the error; the error message names the location.
    """
    records: list[LocatedRecord]
    if Path(path).suffix == ".txt":
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"cannot read prompts from {path}: {error.strerror or error}; check --file.") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"cannot read prompts from {path}: not UTF-8 text ({error}); convert it to UTF-8."
            ) from error
        records = [({"prompt": line}, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    else:
        records = list(read_records(path))
    if not records:
        raise UserError(f"{path} has no prompts; check --file.")
    prompts = []
    for record, where in records:
        messages = record.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(turn, dict) for turn in messages):
            prompts.append(Prompt(render_chat(messages, tokenizer, where), True, record))
        elif messages is None and isinstance(record.get("prompt"), str):
            prompts.append(make_prompt(record["prompt"], tokenizer, chat, system, where)._replace(record=record))
        else:
            keys = ", ".join(sorted(record)) or "none"
            raise UserError(
                f"{where}: the record has neither a string 'prompt' nor 'messages', a list of objects (keys: {keys}); add "
                "one of them."
            )
    return prompts


def make_prompt(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool, system: str | None, where: str) -> Prompt:
    """Return the prompt for a text: the text itself or, with `chat`, a user message rendered by the chat template.

    Raises:
        UserError: with `chat`, if the tokenizer has no chat template, or the template rejects the user or system message.
    """
    if not chat:
        return Prompt(text)
    turns = [{"role": "system", "content": system}] if system else []
    return Prompt(render_chat([*turns, {"role": "user", "content": text}], tokenizer, where), True)


def render_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """Render messages with the chat template; the text ends with the header of the assistant's next turn.

    If the last message is the assistant's answer, as in training data, it is dropped.

    Args:
        messages: messages with "role" and "content".
        tokenizer: tokenizer of the backbone.
        where: location of the messages, used in error messages.

    Raises:
        UserError: if the tokenizer has no chat template, a role is unknown, there is no message before the assistant's answer,
            or the template rejects the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where}: the backbone's tokenizer has no chat template; use neither messages nor --chat.")
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    roles = sorted(set(ROLES.values()))
    if unknown := [turn.get("role") for turn in messages if turn.get("role") not in roles]:
        raise UserError(f"{where}: a message has the unknown role {unknown[0]!r}; use one of {', '.join(roles)}.")
    if not messages:
        raise UserError(f"{where}: there is no message before the assistant's answer; add a user's message.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, KeyError) as error:
        raise UserError(
            f"{where}: the chat template rejects the messages: {error}; correct them, or remove a system message."
        ) from error


class OutputFile:
    """JSON-lines file of the prompts' records, each with its "generated" text.

    The lines are in the order of the prompts and are synced to disk after each batch, so that an interrupted command can resume
    after the last synced line.

    Args:
        path: path of the file; it may already hold the first records.
        prompts: all prompts.

    Attributes:
        done: number of prompts whose records are in the file.

    Raises:
        UserError: if the file cannot be read, or its records do not match the prompts.
    """

    def __init__(self, path: str, prompts: Sequence[Prompt]) -> None:
        self.path = Path(path)
        try:
            records = read_jsonl(self.path)
        except OSError as error:
            raise UserError(
                f"cannot resume --output {path}: {error.strerror or error}; choose another file."
            ) from error
        self.done = len(records)
        if self.done > len(prompts):
            raise UserError(f"--output {path} has {self.done} lines for {len(prompts)} prompts; choose another file.")
        for number, (record, prompt) in enumerate(zip(records, prompts, strict=False), start=1):
            if _without_output(record) != _without_output(json.loads(json.dumps(prompt.record, default=str))):
                raise UserError(f"--output {path}, line {number} does not match prompt {number}; choose another file.")

    def add(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
        """Append the records of prompts with their generated texts, and sync the file to disk.

        Raises:
            UserError: if the file cannot be written.
        """
        records = [(prompt.record or {}) | {"generated": text} for prompt, text in zip(prompts, texts, strict=True)]
        with write_errors(f"--output {self.path}"):
            append_jsonl(self.path, records)
        self.done += len(prompts)


def _without_output(record: Any) -> Any:
    """Return a record without its "generated" text, to compare it with the record of a prompt."""
    if not isinstance(record, dict):
        return record
    return {key: value for key, value in record.items() if key != "generated"}
