"""Seven multiple-choice tasks by the answer's letter, with the authors' prompts.

The authors' texts end in "Answer: " and the letter follows. Here the space belongs to the answer, so that prompt and answer
tokenise as the whole text does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ldmole_dist.data.formats import text_of
from ldmole_dist.data.rows import Row
from ldmole_dist.data.tasks.task import LETTERS, Task, answer_of, number_of, texts_of
from ldmole_dist.errors import UserError

QUESTION = "Below is a multiple-choice question. Please choose the correct answer.\n"


class Question(NamedTuple):
    """What a record asks.

    Args:
        asked: all of the prompt before the options.
        options: their texts.
        answer: which is right, from 0.
        blank: whether an empty line stands before "Answer:", as in some of the authors' prompts.
    """

    asked: str
    options: Sequence[str]
    answer: int
    blank: bool = False


@dataclass(frozen=True)
class ChoiceTask(Task):
    """One whose answer is a letter.

    Args:
        question: from a record and where it is from.
    """

    question: Callable[[Mapping[str, Any], str], Question] | None = None

    def worded(self, record: Mapping[str, Any], where: str) -> Row:
        """The row without a list of options; its answer is the text of the right one. Errors as in `row`."""
        assert self.question is not None
        asked, options, answer, _ = self.question(record, where)
        choices = tuple(f" {option}" for option in options)
        return Row(f"{asked}Answer:", choices[answer], where, choices=choices)

    def row(self, record: Mapping[str, Any], where: str) -> Row:
        """See `Task`."""
        assert self.question is not None
        asked, options, answer, blank = self.question(record, where)
        lines = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        choices = tuple(f" {letter}" for letter in LETTERS[: len(options)])
        prompt = f"{asked}Options:\n{lines}" + ("\nAnswer:" if blank else "Answer:")
        return Row(prompt, choices[answer], where, choices=choices)


def _labelled(record: Mapping[str, Any], where: str) -> tuple[list[str], int]:
    """Options and answer where the options have labels, letters or numbers: what is shown and learnt are letters."""
    choices = record.get("choices")
    if not isinstance(choices, Mapping):
        raise UserError(f"{where}: needs 'choices' with 'text' and 'label', has {choices!r:.60}")
    texts, labels = texts_of(choices, "text", where), texts_of(choices, "label", where)
    if len(texts) != len(labels):
        raise UserError(f"{where}: 'choices' has {len(texts)} texts and {len(labels)} labels")
    return texts, answer_of(record, "answerKey", labels, where)


def _asked(record: Mapping[str, Any], where: str) -> Question:
    question = text_of(record, "question", where)
    return Question(f"{QUESTION}{question}\n", *_labelled(record, where), blank=True)


def _openbookqa(record: Mapping[str, Any], where: str) -> Question:
    stem = text_of(record, "question_stem", where)
    return Question(f"{QUESTION}Question: {stem}\n", *_labelled(record, where), blank=True)


def _swag(record: Mapping[str, Any], where: str) -> Question:
    start = text_of(record, "startphrase", where)
    endings = [text_of(record, f"ending{number}", where) for number in range(4)]
    asked = f"Choose the sentence that best completes the start phrase below:\nstart phrase: {start}\n"
    return Question(asked, endings, number_of(record, "label", 4, where))


def _hellaswag(record: Mapping[str, Any], where: str) -> Question:
    asked = f"Choose the most plausible ending for the following context:\nContext: {text_of(record, 'ctx', where)}\n"
    endings = texts_of(record, "endings", where)
    return Question(asked, endings, number_of(record, "label", len(endings), where))


def _mmlu_pro(record: Mapping[str, Any], where: str) -> Question:
    subject = text_of(record, "category", where).replace("_", " ").lower()
    options = texts_of(record, "options", where)
    answer = answer_of(record, "answer", LETTERS[: len(options)], where)
    if number_of(record, "answer_index", len(options), where) != answer:
        raise UserError(f"{where}: answer {record['answer']!r} and answer_index {record['answer_index']!r} differ")
    asked = f"Below is a multiple-choice question about {subject}. Please choose the correct answer.\n"
    return Question(f"{asked}{text_of(record, 'question', where)}\n", options, answer)


CHOICE = (
    ChoiceTask("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), question=_asked),
    ChoiceTask("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), question=_asked),
    ChoiceTask("commonsense_qa", ("tau/commonsense_qa", None), question=_asked),
    ChoiceTask("openbookqa", ("allenai/openbookqa", "main"), question=_openbookqa),
    ChoiceTask("swag", ("allenai/swag", "regular"), question=_swag),
    ChoiceTask("hellaswag", ("Rowan/hellaswag", None), question=_hellaswag),
    ChoiceTask("mmlu_pro", ("TIGER-Lab/MMLU-Pro", None), hub_split="test", question=_mmlu_pro),
)
