"""Prompts of a file, and the file that their continuations go to, which an interrupted run goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ldmole_dist.data.formats import ROLES
from ldmole_dist.data.records import Located, read_records
from ldmole_dist.errors import UserError

Messages = list[dict[str, str]]


class Prompt(NamedTuple):
    """One to continue.

    Args:
        text: as the model reads it.
        rendered: by a chat template.
        record: of the file that it is from.
    """

    text: str
    rendered: bool = False
    record: dict[str, Any] | None = None


def read_prompts(path: str, tokenizer: PreTrainedTokenizerBase, chat: bool, system: str | None) -> list[Prompt]:
    """Prompts of a file: lines of a .txt, "prompt" or "messages" of the records of a .jsonl, .json, .csv or .parquet.

    Args:
        path: of the file.
        tokenizer: whose chat template renders messages.
        chat: a prompt is what a user says.
        system: what the system says before that.

    Raises:
        UserError: naming file and line, where there is no prompt.
    """
    records: list[Located]
    if Path(path).suffix == ".txt":
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts {path} cannot be read: {error}") from error
        records = [({"prompt": line}, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    else:
        records = list(read_records(path))
    if not records:
        raise UserError(f"{path} holds no prompts")
    prompts = []
    for record, where in records:
        if isinstance(record.get("messages"), list):
            prompts.append(Prompt(rendered(record["messages"], tokenizer, where), True, record))
        elif isinstance(record.get("prompt"), str):
            prompts.append(prompt_of(record["prompt"], tokenizer, chat, system, where)._replace(record=record))
        else:
            raise UserError(f"{where}: needs a text 'prompt' or a list 'messages'; its keys are {sorted(record)}")
    return prompts


def prompt_of(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool, system: str | None, where: str) -> Prompt:
    """A text as it is, or as what a user says.

    Raises:
        UserError: where there is no chat template, or it refuses.
    """
    if not chat:
        return Prompt(text)
    turns = [{"role": "system", "content": system}] if system else []
    return Prompt(rendered([*turns, {"role": "user", "content": text}], tokenizer, where), True)


def rendered(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """What the chat template makes of turns, up to where the assistant begins; the assistant's last turn, which is to be learnt
    in a training file, is left out.

    Raises:
        UserError: where there is no chat template, or it refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where}: the tokenizer of this backbone has no chat template: give prompts without --chat")
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages or any(turn.get("role") not in ROLES.values() for turn in messages):
        raise UserError(
            f"{where}: messages need the roles {sorted(set(ROLES.values()))} and one before the assistant's"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, KeyError) as error:
        raise UserError(f"{where}: the chat template refuses it: {error}") from error


class Continuations:
    """A file of JSON lines, each a record of the prompts' file with its "generated" text; in order, on the disk batch by batch.

    Args:
        path: of the file; what is in it already is not done again.
        prompts: all of them.

    Raises:
        UserError: where it holds something else.
    """

    def __init__(self, path: str, prompts: Sequence[Prompt]) -> None:
        self.path = Path(path)
        whole = self._whole_lines()
        self.done = len(whole)
        if self.done > len(prompts):
            raise UserError(f"{path} has {self.done} lines, more than there are prompts: choose another --output")
        for number, (line, prompt) in enumerate(zip(whole, prompts, strict=False), start=1):
            try:
                same = _without(json.loads(line)) == _without(json.loads(json.dumps(prompt.record, default=str)))
            except (ValueError, AttributeError):
                same = False
            if not same:
                raise UserError(f"{path}, line {number} is not of prompt {number}: choose another --output")

    def add(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
        """Append; it is on the disk when this returns."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                for prompt, text in zip(prompts, texts, strict=True):
                    record = (prompt.record or {}) | {"generated": text}
                    file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"--output {self.path}: {error.strerror or error}; what is in it stays") from error
        self.done += len(prompts)

    def _whole_lines(self) -> list[str]:
        """Lines that are finished; what was cut off by an interruption is cut away."""
        if not self.path.exists():
            return []
        try:
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(self.path, len(whole))
            return whole.decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--output {self.path} cannot be gone on with: {error}; choose another") from error


def _without(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "generated"}
