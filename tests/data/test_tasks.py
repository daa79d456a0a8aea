"""The nine tasks of the paper: exact prompts, answers, errors for invalid records, and a training step of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from ldmole_dist.config import Source, load_config
from ldmole_dist.data.sources import read_rows
from ldmole_dist.data.tasks import TASKS
from ldmole_dist.data.tasks.task import LETTERS
from ldmole_dist.errors import UserError
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import make_backbone, make_config, run_training

FIXTURES = Path(__file__).parent / "fixtures"
MULTIPLE = "Below is a multiple-choice question. Please choose the correct answer.\n"
# Prompt, answer and number of choices of the first row of each task.
EXPECTED: dict[str, tuple[str, str, int | None]] = {
    "arc_challenge": (
        f"{MULTIPLE}A puddle shrinks on a sunny day. What happens to its water?\nOptions:\nA. It freezes.\nB. It evaporates.\n"
        "C. It turns into sand.\nD. It becomes heavier.\n\nAnswer:",
        " B",
        4,
    ),
    "arc_easy": (
        f"{MULTIPLE}Which animal lays eggs?\nOptions:\nA. a cow\nB. a hen\nC. a dog\nD. a horse\n\nAnswer:",
        " B",
        4,
    ),
    "commonsense_qa": (
        f"{MULTIPLE}Where would you keep milk so that it stays fresh?\nOptions:\nA. oven\nB. fridge\nC. bookshelf\nD. garage\n"
        "E. letterbox\n\nAnswer:",
        " B",
        5,
    ),
    "openbookqa": (
        f"{MULTIPLE}Question: A lamp that is plugged in turns electricity into\nOptions:\nA. light\nB. water\nC. soil\n"
        "D. cheese\n\nAnswer:",
        " A",
        4,
    ),
    "swag": (
        "Choose the sentence that best completes the start phrase below:\nstart phrase: A man opens an umbrella. He\nOptions:\n"
        "A. steps out into the rain.\nB. eats the handle.\nC. paints a bridge green.\nD. sleeps in a tree.\nAnswer:",
        " A",
        4,
    ),
    "hellaswag": (
        "Choose the most plausible ending for the following context:\nContext: A woman fills the sink with soapy water. She\n"
        "Options:\nA. picks up a plate and scrubs it.\nB. throws the sink out of the window.\nC. [substeps] becomes a plate.\n"
        "D. drives the water home.\nAnswer:",
        " A",
        4,
    ),
    "mmlu_pro": (
        "Below is a multiple-choice question about math. Please choose the correct answer.\nWhat is 7 times 8?\nOptions:\n"
        "A. 54\nB. 55\nC. 56\nD. 57\nE. 58\nF. 59\nG. 60\nH. 61\nI. 62\nJ. 63\nAnswer:",
        " C",
        10,
    ),
    "cola": ("The cat sat on the mat.", "acceptable", None),
    "rte": ("The bridge was opened in 1932 and is still in use.\nThe bridge is older than 1940.", "entailment", None),
}


def fixture_path(name: str) -> str:
    return str(FIXTURES / f"{name}.jsonl")


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(fixture_path(name)).read_text().splitlines()]


def test_every_task_has_a_fixture() -> None:
    assert set(EXPECTED) == set(TASKS) and len(TASKS) == 9


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_and_answer(name: str) -> None:
    prompt, answer, choices = EXPECTED[name]
    row = TASKS[name].row(records(name)[0], "here")
    assert (row.source, row.target) == (prompt, answer)
    assert row.choices == (None if choices is None else tuple(f" {letter}" for letter in LETTERS[:choices]))


def test_numbered_options_are_answered_by_letters() -> None:
    """The paper's code shows letters, but trains on the number."""
    rows = [TASKS["arc_challenge"].row(record, "here") for record in records("arc_challenge")]
    assert [row.target for row in rows] == [" B", " B", " E", " A"]
    assert [len(row.choices or ()) for row in rows] == [4, 3, 5, 4]


def test_subject_has_no_underscores() -> None:
    assert "about computer science." in TASKS["mmlu_pro"].row(records("mmlu_pro")[2], "here").source


ARC = records("arc_easy")[0]
MMLU = records("mmlu_pro")[0]
BAD: list[tuple[str, dict[str, Any], str]] = [
    (
        "arc_easy",
        ARC | {"answerKey": "E"},
        "answerKey 'E' is not among the labels of the options, ['A', 'B', 'C', 'D']",
    ),
    ("arc_easy", ARC | {"answerKey": ""}, "this split has no labels"),
    ("arc_easy", ARC | {"choices": ["a", "b"]}, "key 'choices' must hold an object with 'text' and 'label'"),
    ("arc_easy", ARC | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "key 'label' holds 1 strings"),
    ("arc_easy", ARC | {"choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}}, "3 texts but 2 labels"),
    ("commonsense_qa", {"question": 3}, "key 'question' must hold a string, got 3"),
    ("openbookqa", {"question": "x"}, "key 'question_stem' must hold a string, but it is missing"),
    ("swag", records("swag")[0] | {"label": 4}, "key 'label' must hold an integer from 0 to 3, got 4"),
    ("swag", {"startphrase": "x"}, "key 'ending0' must hold a string"),
    ("hellaswag", records("hellaswag")[0] | {"label": ""}, "this split has no labels"),
    ("hellaswag", records("hellaswag")[0] | {"endings": "x"}, "key 'endings' must hold a list of strings"),
    ("mmlu_pro", MMLU | {"answer_index": 3}, "answer 'C' and answer_index 3 disagree"),
    ("mmlu_pro", MMLU | {"options": ["x"] * 11}, "key 'options' holds 11 strings, but needs 2 to 10"),
    ("cola", {"sentence": "x", "label": -1}, "this split has no labels"),
    ("cola", {"sentence": "x", "label": True}, "must hold an integer from 0 to 1"),
    ("rte", {"sentence1": "x", "label": 0}, "key 'sentence2' must hold a string"),
]


@pytest.mark.parametrize(("name", "record", "message"), BAD)
def test_error_names_line_and_column(tmp_path: Path, name: str, record: dict[str, Any], message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(records(name)[0]) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError) as raised:
        read_rows([Source(path=str(path), task=name)], TASKS[name].model_task, None)
    assert str(raised.value).startswith(f"{path}, line 2: ") and message in str(raised.value)


def test_task_reads_csv(tmp_path: Path) -> None:
    (tmp_path / "cola.csv").write_text("sentence,label,idx\nIt rains.,1,0\n")
    ((row,),) = read_rows([Source(path=str(tmp_path / "cola.csv"), task="cola")], "sequence_classification", None)
    assert row.target == "acceptable"


def test_single_split_is_divided_into_parts() -> None:
    data = Dataset.from_list([{"n": n} for n in range(100)])
    parts = {name: [r["n"] for r in TASKS["mmlu_pro"].part(data, name)] for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [80, 10, 10]
    assert sorted(n for part in parts.values() for n in part) == list(range(100))
    assert list(TASKS["mmlu_pro"].part(data, "train")["n"]) == parts["train"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[{task: arc}]", "data.train.0.task='arc': input should be 'arc_challenge'"),
        ("data.train=[{tsk: rte}]", "unknown key data.train.0.tsk; did you mean task?"),
        ("data.train=[{}]", "a source has neither path nor task"),
        ("data.train=[]", "data.train is an empty list"),
        ("data.train=[{path: a, weight: 1}, {path: b}]", "some sources have a weight and some do not"),
        ("data.train=[{task: rte, format: text}]", "defines its own format"),
        ("data.train=[{path: a, format: csv}]", "data.train"),
        ("data.train=[{path: a, weight: 0}]", "greater than 0"),
    ],
)
def test_invalid_sources_are_rejected(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(str(make_config(tmp_path)), [override])
    assert message in str(raised.value)


def test_error_without_hub_access_names_the_local_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"set the source to \{task: arc_easy, path: FILE\}"):
        read_rows([Source(task="arc_easy")], "causal_lm", None)


def test_task_must_fit_the_backbone_task() -> None:
    with pytest.raises(UserError, match="data task rte needs backbone.task=sequence_classification"):
        read_rows([Source(task="rte", path=fixture_path("rte"))], "causal_lm", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a backbone whose tokenizer has each letter, with its leading space, as one token."""
    folder = tmp_path_factory.mktemp("tasks")
    make_backbone(folder / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    tokenizer.add_tokens([AddedToken(f" {letter}", normalized=False) for letter in LETTERS])
    model = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    return folder


@pytest.mark.full
def test_every_task_trains_a_step_and_reports_accuracy(folder: Path, ranks1: LocalRanks) -> None:
    for name, task in TASKS.items():
        sources = f"[{{task: {name}, path: {fixture_path(name)}}}]"
        config = make_config(
            folder,
            backbone={"task": task.model_task},
            data={"labels": None, "max_length": 256, "truncation": True},
            optimisation={"max_steps": 1, "micro_batch_size": 2, "global_batch_size": 2},
            parallelism={"ep_size": 1},
            run={"output_dir": str(folder / name), "eval_before": False},
        )
        (result,) = ranks1.run(run_training, str(config), f"data.train={sources}", f"data.eval={sources}")
        rows = len(records(name))
        assert (result["accuracy"] * rows) == pytest.approx(round(result["accuracy"] * rows))
        assert 0 < result["eval_loss"] < 10
