"""Checks of rows on reading, and labels on the answer only."""

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


def test_rows_have_their_location(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, "", GOOD | {"extra": 1}, GOOD)
    rows = read(path, "causal_lm", [" blue"])
    assert [row.where for row in rows] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert rows[0].source == GOOD["prompt"] and rows[0].target == " blue"
    assert len(read(path, "causal_lm", None, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ({"prompt": "x"}, "line 2: key 'completion' must hold a string"),
        ({"prompt": 3, "completion": "x"}, "line 2: key 'prompt' must hold a string, got 3"),
        (GOOD | {"completion": " pink"}, "' pink' is not in data.labels"),
    ],
)
def test_first_invalid_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(UserError) as raised:
        read(write(tmp_path / "data.jsonl", GOOD, line), "causal_lm", [" blue"])
    assert message in str(raised.value)


def test_domain_is_optional(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD | {"domain": "code"}, GOOD, GOOD | {"domain": 3})
    assert [row.domain for row in read(path, "causal_lm", None)] == ["code", None, "3"]


def test_empty_and_binary_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no rows"):
        read(write(tmp_path / "empty.jsonl", ""), "causal_lm", None)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8"):
        read(str(tmp_path / "binary.jsonl"), "causal_lm", None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_backbone(tmp_path_factory.mktemp("tokenizer")))


def test_only_the_answer_is_labeled(tokenizer: PreTrainedTokenizerBase) -> None:
    row = Row(GOOD["prompt"], GOOD["completion"], "here")
    labeled = Encoder(tokenizer, "causal_lm", [" blue", " red"], 32, False).encode(row)
    assert tokenizer.decode(labeled.input_ids) == GOOD["prompt"] + GOOD["completion"]
    assert isinstance(labeled.labels, list) and labeled.labels[:-1] == [IGNORED] * (len(labeled.input_ids) - 1)
    assert labeled.labels[-1] == labeled.input_ids[-1]
    free = Encoder(tokenizer, "causal_lm", None, 32, False).encode(row)  # a free answer must learn to end
    assert free.input_ids == [*labeled.input_ids, tokenizer.eos_token_id]
    assert isinstance(free.labels, list) and free.labels[-2:] == free.input_ids[-2:] and free.labels[-3] == IGNORED


def test_long_prompts_are_truncated_at_the_start_or_rejected(tokenizer: PreTrainedTokenizerBase) -> None:
    row = Row("sky " * 20 + GOOD["prompt"], GOOD["completion"], "data.jsonl, line 7")
    cut = Encoder(tokenizer, "causal_lm", [" blue", " red"], 8, True).encode(row)
    assert len(cut.input_ids) == 8 and tokenizer.decode(cut.input_ids).endswith(" is blue")
    with pytest.raises(UserError, match="line 7: .* tokens exceed data.max_length=8"):
        Encoder(tokenizer, "causal_lm", None, 8, False).encode(row)
    with pytest.raises(UserError, match="leaves no room for the prompt within data.max_length=2"):
        Encoder(tokenizer, "causal_lm", None, 2, True).encode(row)


def test_class_is_the_index_of_its_label(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, "sequence_classification", ["red", "blue"], 32, False)
    assert encoder.encode(Row("The colour of sky", "blue", "here")).labels == 1
