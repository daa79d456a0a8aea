"""Multiple-choice tasks with the prompts of the paper's code, answered with a letter or with the text of an option.

The paper's prompts end in "Answer: ", followed by the letter. Here the space is part of the answer, so that tokenizing prompt
and answer separately gives the same tokens as tokenizing them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ldmole_dist.data.formats import describe_value, get_text
from ldmole_dist.data.rows import Row
from ldmole_dist.data.tasks.task import LETTERS, Task, get_answer_index, get_class_index, get_texts
from ldmole_dist.errors import UserError

QUESTION = "Below is a multiple-choice question. Please choose the correct answer.\n"


class Question(NamedTuple):
    """Multiple-choice question, parsed from a record.

    Args:
        text: prompt up to the options.
        options: texts of the options.
        answer: index of the correct option.
        blank_line: whether a blank line precedes "Answer:", as in some of the paper's prompts.
    """

    text: str
    options: Sequence[str]
    answer: int
    blank_line: bool = False


@dataclass(frozen=True)
class ChoiceTask(Task):
    """Multiple-choice task.

    Args:
        question: function that takes a record and its location and returns the question.
    """

    question: Callable[[Mapping[str, Any], str], Question] | None = None

    def text_row(self, record: Mapping[str, Any], where: str) -> Row:
        """Return the row of a record: the prompt lists no options, and the answer is the text of the correct one.

        Raises:
            UserError: for an invalid record; the message names `where` and the column.
        """
        assert self.question is not None
        text, options, answer, _ = self.question(record, where)
        choices = tuple(f" {option}" for option in options)
        return Row(f"{text}Answer:", choices[answer], where, choices=choices)

    def row(self, record: Mapping[str, Any], where: str) -> Row:
        """Return the row of a record: the prompt lists the options, and the answer is the letter of the correct one.

        Raises:
            UserError: for an invalid record; the message names `where` and the column.
        """
        assert self.question is not None
        text, options, answer, blank_line = self.question(record, where)
        lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        choices = tuple(f" {letter}" for letter in LETTERS[: len(options)])
        prompt = f"{text}Options:\n{lines}" + ("\nAnswer:" if blank_line else "Answer:")
        return Row(prompt, choices[answer], where, choices=choices)


def _labelled(record: Mapping[str, Any], where: str) -> tuple[list[str], int]:
    """Return the options of a record and the index of the correct one.

    The labels in the record may be letters or numbers; the prompt and the answer always use letters.
    """
    choices = record.get("choices")
    if not isinstance(choices, Mapping):
        found = describe_value(record, "choices")
        raise UserError(
            f"{where}: key 'choices' must hold an object with 'text' and 'label', {found}; correct the row."
        )
    texts, labels = get_texts(choices, "text", where), get_texts(choices, "label", where)
    if len(texts) != len(labels):
        raise UserError(f"{where}: 'choices' has {len(texts)} texts but {len(labels)} labels; correct the row.")
    return texts, get_answer_index(record, "answerKey", labels, where)


def _arc(record: Mapping[str, Any], where: str) -> Question:
    question = get_text(record, "question", where)
    return Question(f"{QUESTION}{question}\n", *_labelled(record, where), blank_line=True)


def _openbookqa(record: Mapping[str, Any], where: str) -> Question:
    stem = get_text(record, "question_stem", where)
    return Question(f"{QUESTION}Question: {stem}\n", *_labelled(record, where), blank_line=True)


def _swag(record: Mapping[str, Any], where: str) -> Question:
    start = get_text(record, "startphrase", where)
    endings = [get_text(record, f"ending{number}", where) for number in range(4)]
    text = f"Choose the sentence that best completes the start phrase below:\nstart phrase: {start}\n"
    return Question(text, endings, get_class_index(record, "label", 4, where))


def _hellaswag(record: Mapping[str, Any], where: str) -> Question:
    text = f"Choose the most plausible ending for the following context:\nContext: {get_text(record, 'ctx', where)}\n"
    endings = get_texts(record, "endings", where)
    return Question(text, endings, get_class_index(record, "label", len(endings), where))


def _mmlu_pro(record: Mapping[str, Any], where: str) -> Question:
    subject = get_text(record, "category", where).replace("_", " ").lower()
    options = get_texts(record, "options", where)
    answer = get_answer_index(record, "answer", LETTERS[: len(options)], where)
    if get_class_index(record, "answer_index", len(options), where) != answer:
        raise UserError(
            f"{where}: answer {record['answer']!r} and answer_index {record['answer_index']!r} disagree; correct the row."
        )
    text = f"Below is a multiple-choice question about {subject}. Please choose the correct answer.\n"
    return Question(f"{text}{get_text(record, 'question', where)}\n", options, answer)


CHOICE = (
    ChoiceTask("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), question=_arc),
    ChoiceTask("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), question=_arc),
    ChoiceTask("commonsense_qa", ("tau/commonsense_qa", None), question=_arc),
    ChoiceTask("openbookqa", ("allenai/openbookqa", "main"), question=_openbookqa),
    ChoiceTask("swag", ("allenai/swag", "regular"), question=_swag),
    ChoiceTask("hellaswag", ("Rowan/hellaswag", None), question=_hellaswag),
    ChoiceTask("mmlu_pro", ("TIGER-Lab/MMLU-Pro", None), hub_split="test", question=_mmlu_pro),
)
