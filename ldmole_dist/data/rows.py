"""Examples of a data set, independent of file type and record format."""

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
        source: input of the model: a prompt, or the text to classify; empty for plain text.
        target: expected output: a completion, a class name, or the complete plain text.
        where: location, such as "FILE, line N", used in error messages.
        domain: label such as "code", by which evaluation results and the routing report are grouped; None if unknown.
        choices: all possible targets of this row; None if the row does not list them.
        messages: conversation that replaces source and target; empty if there is none. The tokenizer's chat template renders
            it, and every turn of the assistant is trained on.
    """

    source: str
    target: str
    where: str
    domain: str | None = None
    choices: tuple[str, ...] | None = None
    messages: tuple[Message, ...] = ()
