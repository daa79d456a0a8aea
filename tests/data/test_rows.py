"""Rows are checked where they are read, and the loss is on the answer only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ldmole_dist.data.encode import Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import read_rows
from ldmole_dist.errors import UserError
from ldmole_dist.loss import IGNORED
from tests.small_run import make_backbone

GOOD = {"prompt": "The colour of sky is", "completion": " blue"}


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def read(path: str, task: str, labels: list[str] | None, limit: int | None = None) -> list[Row]:
    (rows,) = read_rows(path, task, labels, limit)
    return rows


def test_rows_know_where_they_are_from(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, "", GOOD | {"extra": 1}, GOOD)
    rows = read(path, "causal_lm", [" blue"])
    assert [row.where for row in rows] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert rows[0].source == GOOD["prompt"] and rows[0].target == " blue"
    assert len(read(path, "causal_lm", None, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"', "line 2: not a JSON object"),
        ("[1]", "line 2: must be a JSON object"),
        ({"prompt": "x"}, "line 2: needs a text 'completion'"),
        ({"prompt": 3, "completion": "x"}, "line 2: needs a text 'prompt', has 3"),
        (GOOD | {"completion": " pink"}, "' pink' is none of data.labels"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(UserError) as raised:
        read(write(tmp_path / "data.jsonl", GOOD, line), "causal_lm", [" blue"])
    assert said in str(raised.value)


def test_a_row_may_have_a_domain(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD | {"domain": "code"}, GOOD, GOOD | {"domain": 3})
    assert [row.domain for row in read(path, "causal_lm", None)] == ["code", None, "3"]


def test_files_that_hold_nothing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no rows"):
        read(write(tmp_path / "empty.jsonl", ""), "causal_lm", None)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8"):
        read(str(tmp_path / "binary.jsonl"), "causal_lm", None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_backbone(tmp_path_factory.mktemp("tokenizer")))


def test_the_loss_is_on_the_answer_only(tokenizer: PreTrainedTokenizerBase) -> None:
    row = Row(GOOD["prompt"], GOOD["completion"], "here")
    labelled = Encoder(tokenizer, "causal_lm", [" blue", " red"], 32, False).encode(row)
    assert tokenizer.decode(labelled.input_ids) == GOOD["prompt"] + GOOD["completion"]
    assert isinstance(labelled.labels, list) and labelled.labels[:-1] == [IGNORED] * (len(labelled.input_ids) - 1)
    assert labelled.labels[-1] == labelled.input_ids[-1]
    free = Encoder(tokenizer, "causal_lm", None, 32, False).encode(row)  # a free answer must be told where to end
    assert free.input_ids == [*labelled.input_ids, tokenizer.eos_token_id]
    assert isinstance(free.labels, list) and free.labels[-2:] == free.input_ids[-2:] and free.labels[-3] == IGNORED


def test_long_prompts_are_cut_at_their_start_or_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    row = Row("sky " * 20 + GOOD["prompt"], GOOD["completion"], "data.jsonl, line 7")
    cut = Encoder(tokenizer, "causal_lm", [" blue", " red"], 8, True).encode(row)
    assert len(cut.input_ids) == 8 and tokenizer.decode(cut.input_ids).endswith(" is blue")
    with pytest.raises(UserError, match="line 7: .* tokens are more than data.max_length=8"):
        Encoder(tokenizer, "causal_lm", None, 8, False).encode(row)
    with pytest.raises(UserError, match="nothing is left to read"):
        Encoder(tokenizer, "causal_lm", None, 2, True).encode(row)


def test_classes_are_their_place_among_the_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, "sequence_classification", ["red", "blue"], 32, False)
    assert encoder.encode(Row("The colour of sky", "blue", "here")).labels == 1
