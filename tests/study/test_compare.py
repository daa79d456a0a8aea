"""Tests of the comparison of routers: its page, its data, and a small comparison from end to end."""

from __future__ import annotations

import io
import json
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from ldmole_dist.config import Adapter
from ldmole_dist.data import vader
from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PREEMPTED, UserError
from ldmole_dist.study.compare.data import TEST, TRAIN, write_data
from ldmole_dist.study.compare.methods import DEFAULT, METHODS, equal_lora_rank, overrides_of
from ldmole_dist.study.compare.page import interval, page, spread
from ldmole_dist.study.compare.rows import Row
from ldmole_dist.study.folder import StudyFolder
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.layer import LdMoleLinear
from tests.small_run import make_backbone, make_config, make_folder

ROOT = Path(__file__).parents[2]


def archive(path: Path, rows: dict[str, int], line: str = "{n}_1\t{rating}\tsentence {n} of {name}.\r\n") -> Path:
    """Write an archive like vaderSentiment's source distribution, with other sentences."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for domain, (name, _) in vader.DOMAINS.items():
            ratings = [-3.2, -0.49, 0.0, 0.5, 2.5]
            text = "".join(line.format(n=n, rating=ratings[n % 5], name=domain) for n in range(rows[domain])).encode()
            add(tar, f"hutto_ICWSM_2014/{name}", text)
    with tarfile.open(path, mode="w:gz") as tar:
        add(tar, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


WHOLE = {domain: rows for domain, (_, rows) in vader.DOMAINS.items()}


def test_rated_sentences(tmp_path: Path) -> None:
    sentences = vader.read_vader(str(archive(tmp_path / "v.tar.gz", WHOLE)))
    assert Counter(s.domain for s in sentences) == WHOLE
    labels = [s.label for s in sentences[:5]]
    assert labels == [" negative", " neutral", " neutral", " positive", " positive"]
    assert sentences[0].row() == {
        "prompt": "Text: sentence 0 of tweets.\nSentiment:",
        "completion": " negative",
        "domain": "tweets",
    }
    assert 0.18 < statistics.mean(s.for_testing for s in sentences) < 0.22
    twice = [vader.Sentence("products", "7", 1.0, text).for_testing for text in ("a", "b")]
    assert twice[0] == twice[1]  # sentences of one document are in the same split


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda p: archive(p, WHOLE | {"tweets": 3}), "tweets_GroundTruth.txt has 3 rows instead of 4200"),
        (lambda p: archive(p, WHOLE, line="{n} {rating}\n"), "as three tab-separated fields"),
        (lambda p: archive(p, WHOLE) and p.write_bytes(p.read_bytes()[:9999]), "cannot read .* as the archive"),
        (lambda p: p.write_bytes(b"no archive"), "cannot read .* as the archive of vaderSentiment 3.3.2"),
        (lambda p: tarfile.open(p, "w:gz").close(), "hutto_ICWSM_2014.tar.gz is missing"),
        (lambda p: None, "No such file"),
    ],
)
def test_other_archives_are_refused(tmp_path: Path, create: Any, message: str) -> None:
    create(tmp_path / "v.tar.gz")
    with pytest.raises(UserError, match=message):
        vader.read_vader(str(tmp_path / "v.tar.gz"))


def test_mixture_is_deterministic(tmp_path: Path) -> None:
    source = str(archive(tmp_path / "v.tar.gz", WHOLE))
    first, again = [[p.read_bytes() for p in write_data(source, tmp_path / name)] for name in ("a", "b")]
    assert first == again
    train, test = [[json.loads(line) for line in text.decode().splitlines()] for text in first]
    assert Counter(r["domain"] for r in train) == dict.fromkeys(vader.DOMAINS, TRAIN["vader"]) | {
        "wordnet": TRAIN["wordnet"]
    }
    assert set(Counter(r["domain"] for r in test).values()) == {TEST}
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}


def test_plain_lora_has_as_many_parameters_as_ld_mole(tmp_path: Path) -> None:
    adapter = Adapter(num_experts=4, r=2, lambda_hidden=8)
    backbone = str(make_backbone(tmp_path / "backbone"))
    lora_rank = equal_lora_rank(backbone, adapter)
    settings = LdMoleConfig(num_experts=4, r=2, lambda_hidden=8, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(backbone), settings)
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linears = [module for module in model.modules() if isinstance(module, LdMoleLinear)]
    assert len(linears) == 7 * 2
    per_rank = sum(sum(linear.base_layer.weight.shape) for linear in linears)
    assert abs(lora_rank * per_rank - whole) <= per_rank / 2
    assert f"adapter.r={lora_rank}" in overrides_of("lora", adapter, backbone)
    assert set(DEFAULT) <= set(METHODS)


def rows() -> list[Row]:
    made = []
    for method, accuracies in {
        "sparsegen": [0.7, 0.8, 0.75],
        "topk": [0.69, 0.79, 0.73],
        "lora": [0.8, 0.7, 0.9],
    }.items():
        for seed, accuracy in enumerate(accuracies):
            after = {"step": 3, "accuracy": accuracy, "eval_loss": 1 - accuracy, "tweets/accuracy": accuracy / 2}
            before = {"accuracy": 0.5, "tweets/accuracy": 0.25} if (method, seed) == ("sparsegen", 0) else None
            made.append(Row(method, seed, after, before, 2.5, 1_000_000, 40.0, None))
    return made


def test_page_has_means_spreads_and_intervals(tmp_path: Path) -> None:
    about = {"command": "launch/compare_routers.py x", "config": "x", "code": "abc", "cores": "2"}
    store = StudyFolder(tmp_path, about, Row)
    for row in rows():
        store.add(row)
    text = re.sub(" +", " ", page(StudyFolder(tmp_path, None, Row)))
    assert "| LD-MoLE (Sparsegen) | 3 | 75.0 ± 5.0 | 0.250 ± 0.050 | 2.50 ± 0.00 | 1.00 M | 40.0 ± 0.0 | – |" in text
    assert "| before training | 50.0 | 25.0 |" in text and "| plain LoRA | 80.0 ± 10.0 | 40.0 ± 5.0 |" in text
    # Student's t with two degrees of freedom: 4.303 standard errors to both sides.
    differences = "-1.3 ± 0.6 | -2.8 to +0.1 | +0.013 ± 0.006 | -0.001 to +0.028"
    assert f"| top-2 (MoLA's router) | {differences} |" in text


def test_intervals_and_spreads() -> None:
    assert interval([1.0, 1.2, 1.1]) == pytest.approx((1.1 - 0.2484, 1.1 + 0.2484), abs=1e-4)
    assert interval([0.0, 0.0]) == (0.0, 0.0)
    assert spread([], 1) == "–" and spread([2.0], 1) == "2.0" and spread([1.0, 2.0], 1, sign=True) == "+1.5 ± 0.7"


def test_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    about = {"command": "c", "config": "x", "code": "abc"}
    StudyFolder(tmp_path / "a", about, Row)
    StudyFolder(tmp_path / "a", about, Row)
    with pytest.raises(UserError, match="code abc, now def"):
        StudyFolder(tmp_path / "a", about | {"code": "def"}, Row)
    with pytest.raises(UserError, match="holds no study"):
        StudyFolder(tmp_path / "b", None, Row)
    (tmp_path / "a" / "cells.jsonl").write_text('{"method": 1}\n')
    with pytest.raises(UserError, match="line 1 cannot be read"):
        StudyFolder(tmp_path / "a", None, Row).rows()


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    script = [sys.executable, str(ROOT / "launch" / "compare_routers.py"), str(folder / "config.yaml")]
    options = [
        "--output",
        str(folder / "out"),
        "--seeds",
        "2",
        "--methods",
        "sparsegen,lora",
        "--jobs",
        "2",
        *more,
    ]
    return subprocess.Popen([*script, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.full
def test_small_comparison_is_interrupted_and_resumed(tmp_path: Path) -> None:
    make_folder(tmp_path)
    make_config(tmp_path, optimisation={"max_steps": 16}, parallelism={"ep_size": 1}, run={"detail_every": 4})
    first = start(tmp_path)
    try:
        run = tmp_path / "out" / "sparsegen" / "seed_0"
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 3:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        message = first.communicate(timeout=120)[0]
    finally:
        first.kill()
    assert first.returncode == EXIT_PREEMPTED and "run the same command again to resume" in message
    assert list((run / "checkpoints").glob("step_*")), message

    again = start(tmp_path)
    message = again.communicate(timeout=240)[0]
    assert again.returncode == 0, message
    rows = StudyFolder(tmp_path / "out", None, Row).rows()
    assert Counter(row.method for row in rows) == {"sparsegen": 2, "lora": 2}
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == list(
        range(1, 17)
    )
    text = (tmp_path / "out" / "routers.md").read_text()
    assert "plain LoRA" in text and "before training" in text
    third = start(tmp_path)  # nothing is left to do
    assert third.communicate(timeout=60)[0].count("Loading weights") == 0 and third.returncode == 0

    wrong = start(tmp_path, "--methods", "best")
    assert "--methods: unknown method best" in wrong.communicate(timeout=60)[0] and wrong.returncode == EXIT_EXPLAINED
