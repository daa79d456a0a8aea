"""One example of a data set, whatever file and format it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        source: what the model reads: a prompt, or the text to classify; empty for plain text.
        target: what it should answer: a completion, a class name, or all of a plain text.
        where: file and line, for messages.
        domain: what kind of text it is ("code"), where the data says; results and the routing report are grouped by it.
        choices: all possible targets of this row, where it has its own.
        messages: a conversation instead of source and target: the tokenizer's chat template renders it, and every turn of the
            assistant is learnt.
    """

    source: str
    target: str
    where: str
    domain: str | None = None
    choices: tuple[str, ...] | None = None
    messages: tuple[Message, ...] = ()
