"""Record formats: functions that check a record and convert it to a row.

Each format takes a record and its location, and returns the row. It raises a UserError for an invalid record; the message names
the location, the reason and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ldmole_dist.data.rows import Message, Row
from ldmole_dist.errors import UserError

Record = Mapping[str, Any]
Format = Callable[[Record, str], Row]

ALPACA = "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request.\n\n"
# Role names in ShareGPT and OpenAI files -> role names in chat templates. `sharegpt` and `messages` accept all of them.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def prompt_completion(record: Record, where: str) -> Row:
    """Convert {"prompt": ..., "completion": ...} to a row; the completion is trained on.

    A list under "choices" is optional and holds all possible completions of the record.
    """
    prompt, completion = get_text(record, "prompt", where), get_text(record, "completion", where)
    choices = record.get("choices")
    if choices is None:
        return Row(prompt, completion, where, get_domain(record))
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or len(set(choices)) < max(2, len(choices)) or completion not in choices:
        raise UserError(
            f"{where}: 'choices' is {choices!r:.60}; make it a list of two or more strings without repetitions, one of "
            f"which is the completion {completion!r:.60}."
        )
    return Row(prompt, completion, where, get_domain(record), tuple(choices))


def alpaca(record: Record, where: str) -> Row:
    """Convert {"instruction": ..., "input": ..., "output": ...} to a row with the prompt of Alpaca; the output is trained on.

    "input" may be empty or missing.
    """
    instruction, output = get_text(record, "instruction", where), get_text(record, "output", where)
    context = record.get("input") or ""
    if not isinstance(context, str):
        raise UserError(f"{where}: 'input' is {context!r:.60}; make it a string or remove it.")
    prompt = ALPACA.format(also=", paired with an input that provides further context" if context else "")
    prompt += (
        f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{context}\n\n" if context else "") + "### Response:\n"
    )
    return Row(prompt, output, where, get_domain(record))


def sharegpt(record: Record, where: str) -> Row:
    """Convert {"conversations": [{"from": "human", "value": ...}, ...]} to a row; turns from "gpt" are trained on.

    A turn may also be from "system". "assistant" is accepted as another name of "gpt", and "user" of "human".
    """
    return _conversation(record, "conversations", "from", "value", where)


def messages(record: Record, where: str) -> Row:
    """Convert {"messages": [{"role": "user", "content": ...}, ...]} to a row; the assistant's turns are trained on."""
    return _conversation(record, "messages", "role", "content", where)


def text(record: Record, where: str) -> Row:
    """Convert {"text": ...} to a row; the complete text is trained on."""
    return Row("", get_text(record, "text", where), where, get_domain(record))


def classification(record: Record, where: str) -> Row:
    """Convert {"text": ..., "label": ...} to a row; the label is a class name."""
    return Row(get_text(record, "text", where), get_text(record, "label", where), where, get_domain(record))


# Each format of causal_lm with the keys that identify it. The first match wins, so the order matters for records that match
# several.
CAUSAL: dict[str, tuple[Format, frozenset[str]]] = {
    "prompt_completion": (prompt_completion, frozenset({"prompt", "completion"})),
    "alpaca": (alpaca, frozenset({"instruction", "output"})),
    "sharegpt": (sharegpt, frozenset({"conversations"})),
    "messages": (messages, frozenset({"messages"})),
    "text": (text, frozenset({"text"})),
}
FORMATS: dict[str, Format] = {name: format for name, (format, _) in CAUSAL.items()} | {"classification": classification}


def detect_format(record: Record, where: str, task: str) -> str:
    """Return the name of the format that the keys of a record match; always "classification" for sequence classification.

    Args:
        record: first record of a file.
        where: location of the record.
        task: "causal_lm" or "sequence_classification".

    Raises:
        UserError: if no format matches.
    """
    if task == "sequence_classification":
        return "classification"
    found = [name for name, (_, keys) in CAUSAL.items() if keys <= record.keys()]
    if not found:
        known = "; ".join(f"{name} has {', '.join(sorted(keys))}" for name, (_, keys) in CAUSAL.items())
        raise UserError(
            f"{where}: the keys {sorted(record)} match no format ({known}); rename the keys, or set the source's `task` if "
            "they are the columns of a task."
        )
    return found[0]


def get_text(record: Record, key: str, where: str) -> str:
    """Return the string stored under a key.

    Raises:
        UserError: if the key is missing or its value is not a string.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: key {key!r} must hold a string, {describe_value(record, key)}; correct the row.")
    return value


def describe_value(record: Record, key: str) -> str:
    """Return the end of an error message about the value of a key: the value, or that the key is missing."""
    return f"got {record[key]!r:.60}" if key in record else f"but it is missing from the keys {sorted(record)}"


def get_domain(record: Record) -> str | None:
    """Return the value of the record's "domain" key as a string; None if the record has no domain."""
    domain = record.get("domain")
    return None if domain is None else str(domain)


def _conversation(record: Record, key: str, role_key: str, text_key: str, where: str) -> Row:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        found = describe_value(record, key)
        raise UserError(f"{where}: key {key!r} must hold a non-empty list of turns, {found}; correct the row.")
    parsed = []
    for number, turn in enumerate(turns, start=1):
        turn_where = f"{where}, turn {number}"
        if not isinstance(turn, Mapping):
            raise UserError(
                f"{turn_where}: expected an object with {role_key!r} and {text_key!r}, got {turn!r:.60}; correct the row."
            )
        role = ROLES.get(get_text(turn, role_key, turn_where))
        if role is None:
            raise UserError(f"{turn_where}: unknown {role_key}={turn[role_key]!r}; use one of {', '.join(ROLES)}.")
        parsed.append(Message(role, get_text(turn, text_key, turn_where)))
    if parsed[-1].role != "assistant":
        raise UserError(
            f"{where}: the last turn is the {parsed[-1].role}'s, but only the assistant's turns are trained on; end the "
            "conversation with a turn of the assistant."
        )
    return Row("", "", where, get_domain(record), messages=tuple(parsed))
