"""Record formats and file types: the parsed rows, and the errors for invalid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ldmole_dist.config import Source
from ldmole_dist.data.encode import Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import read_rows
from ldmole_dist.errors import UserError
from ldmole_dist.loss import IGNORED
from tests.small_run import make_backbone

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "sky?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "leaf?"},
    {"role": "assistant", "content": "green"},
]
GOOD: dict[str, dict[str, Any]] = {
    "prompt_completion": {"prompt": "sky is", "completion": " blue"},
    "alpaca": {"instruction": "Name the colour.", "input": "sky", "output": "blue"},
    "sharegpt": {"conversations": [{"from": "human", "value": "sky?"}, {"from": "gpt", "value": "blue"}]},
    "messages": {"messages": TURNS},
    "text": {"text": "The sky is blue."},
    "classification": {"text": "sky", "label": "blue"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(make_backbone(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.chat_template = CHAT
    return tokenizer


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def task_for(format: str) -> str:
    return "sequence_classification" if format == "classification" else "causal_lm"


def labeled_parts(tokenizer: PreTrainedTokenizerBase, row: Row, length: int = 300) -> list[tuple[bool, str]]:
    """Return (whether it is trained on, text) of each part of an encoded row."""
    encoded = Encoder(tokenizer, "causal_lm", None, length, False).encode(row)
    assert isinstance(encoded.labels, list)
    found: list[tuple[bool, list[int]]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORED, token)
        if not found or found[-1][0] != (label != IGNORED):
            found.append((label != IGNORED, []))
        found[-1][1].append(token)
    return [(trained, tokenizer.decode(ids)) for trained, ids in found]


ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nName the colour.\n\n### Input:\nsky\n\n### Response:\n"
)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("prompt_completion", [(False, "sky is"), (True, " blue</s>")]),
        ("alpaca", [(False, ALPACA), (True, "blue</s>")]),
        ("sharegpt", [(False, "[user]sky?</s>[assistant]"), (True, "blue</s>")]),
        (
            "messages",
            [
                (False, "[system]Be brief.</s>[user]sky?</s>[assistant]"),
                (True, "blue</s>"),
                (False, "[user]leaf?</s>[assistant]"),
                (True, "green</s>"),
            ],
        ),
        ("text", [(True, "The sky is blue.</s>")]),
    ],
)
def test_only_answers_are_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, format: str, expected: list[tuple[bool, str]]
) -> None:
    path = write(tmp_path / "data.jsonl", GOOD[format])
    for data in (path, [Source(path=path, format=format)]):  # detected, and configured
        ((row,),) = read_rows(data, "causal_lm", None)
        assert labeled_parts(tokenizer, row) == expected


def test_alpaca_input_is_optional(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ((row,),) = read_rows(
        write(tmp_path / "a.jsonl", {"instruction": "Say hello.", "output": "hello"}), "causal_lm", None
    )
    assert "input" not in row.source.lower() and row.source.endswith("### Response:\n")


def test_long_texts_are_truncated_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = Encoder(tokenizer, "causal_lm", None, 5, True).encode(Row("", "sky is blue " * 9, "here")).input_ids
    assert len(ids) == 5 and tokenizer.decode(ids).startswith("sky is")


BAD: list[tuple[str, Any, str]] = [
    ("prompt_completion", {"prompt": "x"}, "keys ['prompt'] match no format"),
    ("prompt_completion", {"prompt": "x", "completion": None}, "key 'completion' must hold a string, got None"),
    ("alpaca", {"instruction": 3, "output": "x"}, "key 'instruction' must hold a string, got 3"),
    ("alpaca", {"instruction": "x", "input": ["y"], "output": "z"}, "'input' is ['y']; make it a string or remove it"),
    ("sharegpt", {"conversations": []}, "key 'conversations' must hold a non-empty list of turns"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "turn 1: key 'value' must hold a string"),
    ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "turn 1: unknown from='bot'"),
    ("messages", {"messages": "hello"}, "key 'messages' must hold a non-empty list of turns"),
    ("messages", {"messages": ["hello"]}, "turn 1: expected an object"),
    ("messages", {"messages": TURNS[:4]}, "the last turn is the user's"),
    ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "unknown role='tool'"),
    ("text", {"text": 7}, "key 'text' must hold a string, got 7"),
    ("classification", {"text": "x", "label": 1}, "key 'label' must hold a string, got 1"),
    ("classification", {"label": "x"}, "key 'text' must hold a string"),
]


@pytest.mark.parametrize(("format", "record", "message"), BAD)
def test_error_names_file_line_and_reason(tmp_path: Path, format: str, record: Any, message: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD[format], record)
    data = [Source(path=path, format=format)] if "match no format" not in message else path
    if "match no format" in message:
        path = write(tmp_path / "data.jsonl", record)
    with pytest.raises(UserError) as raised:
        read_rows(data, task_for(format), None)
    line = 1 if "match no format" in message else 2
    assert str(raised.value).startswith(f"{path}, line {line}") and message in str(raised.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_file_types(tmp_path: Path, kind: str) -> None:
    records = [GOOD["prompt_completion"], {"prompt": "two\nlines, and a comma", "completion": " x"}]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif kind == "csv":
        path.write_text('prompt,completion\nsky is, blue\n"two\nlines, and a comma", x\n')
    elif kind == "json":
        path.write_text(json.dumps(records, indent=1))
    else:
        write(path, *records)
    (rows,) = read_rows(str(path), "causal_lm", None)
    assert [(row.source, row.target) for row in rows] == [(r["prompt"], r["completion"]) for r in records]
    locations = {"jsonl": "line 2", "json": "row 2", "csv": "line 4", "parquet": "row 2"}
    assert rows[1].where == f"{path}, {locations[kind]}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"prompt": "x"\n', "bad.jsonl, line 1: not valid JSON"),
        ("bad.json", b'[{"prompt": "x",\n}]', "bad.json, line 2: not valid JSON"),
        ("bad.json", b"[3]", "bad.json, row 1: expected a JSON object"),
        ("bad.csv", b"prompt,completion\nx\n", "bad.csv, line 2: the number of fields differs"),
        ("bad.csv", b"prompt,completion\nx,y,z\n", "bad.csv, line 2: the number of fields differs"),
        ("bad.parquet", b"PAR1 or not", "bad.parquet is not valid Parquet"),
        ("bad.csv", b"prompt,completion\n\xff\xfe,x\n", "bad.csv is not UTF-8"),
    ],
)
def test_invalid_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_rows(str(tmp_path / name), "causal_lm", None)
    assert message in str(raised.value)


def test_unusable_chat_template_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    ((row,),) = read_rows(write(tmp_path / "m.jsonl", GOOD["messages"]), "causal_lm", None)
    try:
        for template, message in (
            (None, "has no chat template"),
            ("{{ raise_exception('no system turns') }}", "the chat template rejects the conversation: no system turns"),
            ("{{ messages | length }}{{ messages[-1].content }}", "changes the text before turn"),
        ):
            tokenizer.chat_template = template
            with pytest.raises(UserError, match=message):
                labeled_parts(tokenizer, row)
    finally:
        tokenizer.chat_template = CHAT


def test_source_name_is_the_default_domain(tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", GOOD["text"], GOOD["text"] | {"domain": "own"})
    second = write(tmp_path / "second.jsonl", GOOD["prompt_completion"])
    found = read_rows([Source(path=first), Source(path=second, name="answers")], "causal_lm", None)
    assert [[row.domain for row in rows] for rows in found] == [["first", "own"], ["answers"]]


def test_format_must_fit_the_backbone_task(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD["text"])
    with pytest.raises(
        UserError, match="format text needs backbone.task=causal_lm, but the config has backbone.task=seq"
    ):
        read_rows([Source(path=path, format="text")], "sequence_classification", ["a", "b"])
