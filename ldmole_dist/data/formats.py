"""Formats of records: from the keys that people's files have to rows. A format checks what it reads.

Each takes a record and where it is from, and raises a UserError that names that, the reason and what is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ldmole_dist.data.rows import Message, Row
from ldmole_dist.errors import UserError

Record = Mapping[str, Any]
Format = Callable[[Record, str], Row]

ALPACA = "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request.\n\n"
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}  # as ShareGPT and others name them


def prompt_completion(record: Record, where: str) -> Row:
    """{"prompt", "completion"}: the completion is learnt. "choices" may list all completions that are possible for this row."""
    prompt, completion = text_of(record, "prompt", where), text_of(record, "completion", where)
    choices = record.get("choices")
    if choices is None:
        return Row(prompt, completion, where, domain_of(record))
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or len(set(choices)) < max(2, len(choices)) or completion not in choices:
        raise UserError(
            f"{where}: 'choices' must be a list of at least two different texts with the completion {completion!r:.60} among "
            f"them, is {choices!r:.60}"
        )
    return Row(prompt, completion, where, domain_of(record), tuple(choices))


def alpaca(record: Record, where: str) -> Row:
    """{"instruction", "input", "output"}, input may be empty or missing: the output is learnt, after Alpaca's prompt."""
    instruction, output = text_of(record, "instruction", where), text_of(record, "output", where)
    given = record.get("input") or ""
    if not isinstance(given, str):
        raise UserError(f"{where}: 'input' must be a text or missing, is {given!r:.60}")
    prompt = ALPACA.format(also=", paired with an input that provides further context" if given else "")
    prompt += f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n"
    return Row(prompt, output, where, domain_of(record))


def sharegpt(record: Record, where: str) -> Row:
    """{"conversations": [{"from": "human", "value": ...}, ...]}: what gpt says is learnt."""
    return _conversation(record, "conversations", "from", "value", where)


def messages(record: Record, where: str) -> Row:
    """{"messages": [{"role": "user", "content": ...}, ...]}: what the assistant says is learnt."""
    return _conversation(record, "messages", "role", "content", where)


def text(record: Record, where: str) -> Row:
    """{"text"}: all of it is learnt."""
    return Row("", text_of(record, "text", where), where, domain_of(record))


def classification(record: Record, where: str) -> Row:
    """{"text", "label"}, the label a class name."""
    return Row(text_of(record, "text", where), text_of(record, "label", where), where, domain_of(record))


# By the keys that a record of each has; the first that fits a file's first record is taken.
CAUSAL: dict[str, tuple[Format, frozenset[str]]] = {
    "prompt_completion": (prompt_completion, frozenset({"prompt", "completion"})),
    "alpaca": (alpaca, frozenset({"instruction", "output"})),
    "sharegpt": (sharegpt, frozenset({"conversations"})),
    "messages": (messages, frozenset({"messages"})),
    "text": (text, frozenset({"text"})),
}
FORMATS: dict[str, Format] = {name: format for name, (format, _) in CAUSAL.items()} | {"classification": classification}


def recognised(record: Record, where: str, task: str) -> str:
    """The name of the format of a record, by its keys.

    Args:
        record: the first of a file.
        where: it is from.
        task: "causal_lm" or "sequence_classification".

    Raises:
        UserError: where it is none's.
    """
    if task == "sequence_classification":
        return "classification"
    found = [name for name, (_, keys) in CAUSAL.items() if keys <= record.keys()]
    if not found:
        known = "; ".join(f"{name} has {', '.join(sorted(keys))}" for name, (_, keys) in CAUSAL.items())
        raise UserError(
            f"{where}: its keys {sorted(record)} are those of no format ({known}): rename them, or give `format`"
        )
    return found[0]


def text_of(record: Record, key: str, where: str) -> str:
    """The text under a key.

    Raises:
        UserError: where there is none.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: needs a text {key!r}, has {value!r:.60}; its keys are {sorted(record)}")
    return value


def domain_of(record: Record) -> str | None:
    """What the record says of its domain."""
    domain = record.get("domain")
    return None if domain is None else str(domain)


def _conversation(record: Record, key: str, role_key: str, text_key: str, where: str) -> Row:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {key!r} must be a list of turns, is {turns!r:.60}")
    found = []
    for number, turn in enumerate(turns, start=1):
        here = f"{where}, turn {number}"
        if not isinstance(turn, Mapping):
            raise UserError(f"{here}: must be an object with {role_key!r} and {text_key!r}, is {turn!r:.60}")
        role = ROLES.get(text_of(turn, role_key, here))
        if role is None:
            raise UserError(f"{here}: {role_key} {turn[role_key]!r} is not known: there are {', '.join(ROLES)}")
        found.append(Message(role, text_of(turn, text_key, here)))
    if found[-1].role != "assistant":
        raise UserError(
            f"{where}: the last turn is the {found[-1].role}'s: it must be the assistant's, which is learnt"
        )
    return Row("", "", where, domain_of(record), messages=tuple(found))
