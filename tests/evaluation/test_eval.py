"""`ldmole eval` and lm-eval on a trained run: equal to a reference, to the training's own evaluation, and on any ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldmole_dist.engine.startup import start
from ldmole_dist.errors import PeerError, UserError
from ldmole_dist.evaluation.command import format_table
from ldmole_dist.evaluation.model import eval_config, load_distributed, load_eval_data
from ldmole_dist.evaluation.rows import evaluate_rows
from ldmole_dist.model.backbone import load_adapter, load_backbone, load_tokenizer
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import COLOURS, LABELS, make_config, make_data, make_folder, run_training

QUESTION_SETTINGS = ("data.labels=null", "data.max_length=64")
FLAVOURS = [" sour", " sweet and red", " not at all sour, but a little salty"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks2: LocalRanks) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("eval"))
    ranks2.run(run_training, str(make_config(folder, optimisation={"learning_rate": 0.05})), "adapter.lora_dropout=0.0")
    questions = [
        {
            "prompt": f"The taste of {thing} is",
            "completion": FLAVOURS[n % 3],
            "choices": FLAVOURS,
            "domain": "ab"[n % 2],
        }
        for n, thing in enumerate(["a cherry", "grass", "the sea", "fog and ash", "a rose", "blood", "a leaf"])
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


def evaluated(
    folder: Path, *overrides: str, data: str | None = None, path: str = "run", **settings: Any
) -> dict[str, Any]:
    """Evaluate on ranks."""
    found = find_saved_model(str(folder / path), None)
    config = eval_config(found, list(overrides), data and str(folder / data), settings.get("limit"), 3)
    rows, encoder = load_eval_data(config)
    with load_distributed(config, settings.get("with_adapter", True)) as model:
        return evaluate_rows(model, encoder, rows, settings.get("likelihood", False))


def reference(folder: Path, with_adapter: bool) -> dict[str, float]:
    """Compute the metrics of the questions one answer at a time; run on a rank, because the model needs a process group."""
    start()
    model: Any = load_backbone(str(folder / "backbone"), "causal_lm", "fp32")
    if with_adapter:
        model = load_adapter(model, str(folder / "run" / "adapter"), trainable=False)
    model.eval()
    tokenizer = load_tokenizer(str(folder / "backbone"))
    right = by_byte = 0
    loss, answers = 0.0, 0
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(choice)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
            if choice == row["completion"]:
                loss, answers = loss - scores[-1], answers + len(answer)
        target = row["choices"].index(row["completion"])
        right += max(range(3), key=scores.__getitem__) == target
        by_byte += max(range(3), key=lambda i: scores[i] / len(row["choices"][i].strip())) == target
    return {"accuracy": right / len(rows), "accuracy_norm": by_byte / len(rows), "loss": loss / answers}


def test_equals_the_evaluation_of_the_training_run(folder: Path, ranks1: LocalRanks) -> None:
    last = json.loads((folder / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    (found,) = ranks1.run(evaluated, folder)
    assert found["all"]["accuracy"] == last["accuracy"] and found["all"]["loss"] == pytest.approx(
        last["eval_loss"], rel=1e-5
    )
    assert found["all"]["rows"] == 12 and {"f1_macro", "matthews"} <= set(found["all"])
    # Answers of one token: the choice by likelihood is the choice by first token.
    (by_likelihood,) = ranks1.run(evaluated, folder, likelihood=True)
    assert by_likelihood["all"]["accuracy"] == last["accuracy"] and by_likelihood["all"]["loss"] == pytest.approx(
        last["eval_loss"], rel=1e-5
    )
    # An adapter without a run has no data and labels of its own.
    labels = f"data.labels={json.dumps(LABELS)}"
    alone = {"path": "run/adapter", "data": "eval.jsonl"}
    (adapter,) = ranks1.run(evaluated, folder, labels, "parallelism.precision=fp32", "data.max_length=32", **alone)
    assert flat(adapter) == pytest.approx(flat(found), rel=1e-5)
    (few,) = ranks1.run(evaluated, folder, limit=5)
    assert few["all"]["rows"] == 5


@pytest.mark.parametrize("with_adapter", [True, False])
def test_likelihood_of_long_answers_equals_reference(folder: Path, ranks1: LocalRanks, with_adapter: bool) -> None:
    (expected,) = ranks1.run(reference, folder, with_adapter)
    (other,) = ranks1.run(reference, folder, not with_adapter)
    assert abs(expected["loss"] - other["loss"]) > 1e-3  # the adapter has an effect
    (found,) = ranks1.run(
        evaluated, folder, *QUESTION_SETTINGS, data="questions.jsonl", likelihood=True, with_adapter=with_adapter
    )
    assert {name: found["all"][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert [found["domains"][d]["rows"] for d in "ab"] == [4, 3] and "f1_macro" not in found["all"]


@pytest.mark.parametrize("stage", [3, pytest.param(0, marks=pytest.mark.full)])
def test_results_are_independent_of_ranks_and_stage(
    folder: Path, ranks1: LocalRanks, ranks4: LocalRanks, stage: int
) -> None:
    for settings in ({}, {"data": "questions.jsonl", "likelihood": True}):
        labels = QUESTION_SETTINGS if settings else ()
        (alone,) = ranks1.run(evaluated, folder, *labels, **settings)
        overrides = [f"parallelism.deepspeed=zero{stage}", "parallelism.ep_size=2", *labels]
        for found in ranks4.run(evaluated, folder, *overrides, **settings):
            assert flat(found) == pytest.approx(flat(alone), rel=1e-5)


@pytest.mark.full
def test_classifier(tmp_path: Path, ranks1: LocalRanks, ranks2: LocalRanks) -> None:
    make_folder(tmp_path)
    for name, rows in (("train", 60), ("eval", 25)):
        make_data(tmp_path / f"{name}.jsonl", rows, "sequence_classification")
    changes: dict[str, Any] = {"backbone": {"task": "sequence_classification"}, "data": {"labels": COLOURS}}
    ranks2.run(run_training, str(make_config(tmp_path, **changes)))
    last = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    (alone,) = ranks1.run(evaluated, tmp_path)
    assert alone["all"]["accuracy"] == last["accuracy"]
    assert alone["all"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert {"f1_macro", "matthews"} <= set(alone["all"])
    for found in ranks2.run(evaluated, tmp_path, "parallelism.deepspeed=zero3"):
        assert flat(found) == pytest.approx(flat(alone), rel=1e-5)


def flat(result: dict[str, Any]) -> dict[str, float]:
    groups = {"": result["all"]} | result["domains"]
    return {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}


@pytest.mark.full
def test_command_writes_results(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "ldmole_dist.cli", "eval", str(folder / "run"), "--output", str(out)]
    done = subprocess.run([*command, "--batch-size", "4"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["chosen_by"] == "first token" and result["adapter"] == str(folder / "run" / "adapter")
    assert f"{100 * result['all']['accuracy']:.2f} ± " in done.stdout


def test_table_has_one_line_per_domain() -> None:
    values = {"rows": 4, "answers": 4, "loss": 0.5, "perplexity": 1.65, "accuracy": 0.75, "accuracy_stderr": 0.25}
    lines = format_table(
        {"all": values, "domains": {"code": values | {"rows": 2}, "prose": {"rows": 2, "loss": 0.1}}}
    ).splitlines()
    assert lines[0].split() == ["rows", "accuracy", "loss", "perplexity"]
    assert lines[2].split() == ["code", "2", "75.00", "±", "25.00", "%", "0.5000", "1.6500"]
    assert lines[3].split() == ["prose", "2", "-", "0.1000", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "is neither a run"),
        (["RUN", "--lm-eval-path", "x"], "require --lm-eval"),
        (["RUN", "--output", "no/such/folder/x.json"], "its folder does not exist"),
        (["RUN", "data.labelz=1"], "unknown key data.labelz"),
    ],
)
def test_invalid_arguments_are_rejected(folder: Path, arguments: list[str], message: str) -> None:
    from ldmole_dist.cli import _parser

    args = _parser().parse_args(["eval", *(str(folder / "run") if a == "RUN" else a for a in arguments)])
    with pytest.raises(UserError, match=message):
        args.call(args)


def make_tasks(folder: Path) -> Path:
    """Write lm-eval tasks on the questions: multiple choice, likelihood of full texts, and generation."""
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
    }
    choosing = {
        "task": "flavours",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{choices.index(completion)}}",
        "doc_to_choice": "{{choices | map('trim') | list}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_bytes")],
    }
    reading = {
        "task": "flavour_texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}{{completion}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity")],
    }
    writing = {
        "task": "flavour_answers",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    broken = choosing | {
        "task": "no_data",
        "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}},
    }
    for task in (choosing, reading, writing, broken):
        (tasks / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return tasks


def harness(folder: Path, tasks: list[str], own: bool, with_adapter: bool = True) -> dict[str, Any]:
    """Run lm-eval on ranks: through the bridge, or with `own` through the harness's own wrapper of the same model."""
    os.environ["HF_HOME"] = str(folder / "hf")  # cache folder of datasets
    from ldmole_dist.evaluation import lm_eval_bridge

    saved = find_saved_model(str(folder / "run"), None)
    with load_distributed(eval_config(saved, [], None, None, 3), with_adapter) as model:
        if own:
            from lm_eval.models.huggingface import HFLM

            wrapped = HFLM(pretrained=model.engine.module.get_base_model(), tokenizer=model.tokenizer, batch_size=1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lm_eval_bridge, "LdMoleLM", lambda _: wrapped)
                return lm_eval_bridge.run_lm_eval(model, tasks, str(make_tasks(folder)), None, None)["lm_eval"]
        return lm_eval_bridge.run_lm_eval(model, tasks, str(make_tasks(folder)), None, None)["lm_eval"]


@pytest.mark.full
def test_lm_eval_equals_ldmole_eval(folder: Path, ranks1: LocalRanks, ranks2: LocalRanks) -> None:
    (ours,) = ranks1.run(evaluated, folder, *QUESTION_SETTINGS, data="questions.jsonl", likelihood=True)
    make_tasks(folder)
    (alone,) = ranks1.run(harness, folder, ["flavours"], False)
    for found in [alone, *ranks2.run(harness, folder, ["flavours"], False)]:
        values = found["flavours"]
        assert values["acc,none"] == ours["all"]["accuracy"]
        assert values["acc_bytes,none"] == ours["all"]["accuracy_norm"]
        assert values["acc_stderr,none"] == pytest.approx(ours["all"]["accuracy_stderr"])


@pytest.mark.full
def test_lm_eval_equals_its_own_wrapper(folder: Path, ranks1: LocalRanks) -> None:
    tasks = ["flavours", "flavour_texts", "flavour_answers"]
    make_tasks(folder)
    (through,), (wrapped,) = (ranks1.run(harness, folder, tasks, own) for own in (False, True))
    for task in tasks:
        numbers = {name: value for name, value in wrapped[task].items() if isinstance(value, float)}
        assert numbers and {name: through[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


def error_message(function: Callable[..., Any], *args: Any, **settings: Any) -> str:
    """Return the error message of a function call; run on ranks."""
    with pytest.raises((UserError, PeerError)) as raised:
        function(*args, **settings)
    return str(raised.value)


@pytest.mark.full
def test_unsupported_requests_are_named(folder: Path, ranks2: LocalRanks) -> None:
    make_tasks(folder)
    for message in ranks2.run(error_message, harness, folder, ["flavour_answers"], False):
        assert "run in one process only" in message
    assert "cannot load the lm-eval tasks no_data" in ranks2.run(error_message, harness, folder, ["no_data"], False)[0]
    assert (
        "unknown lm-eval tasks: no_such_task" in ranks2.run(error_message, harness, folder, ["no_such_task"], False)[0]
    )
    assert (
        "eval.jsonl, line 1: --likelihood needs the possible answers"
        in ranks2.run(error_message, evaluated, folder, "data.labels=null", likelihood=True)[0]
    )
