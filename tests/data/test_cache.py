"""Token cache: cached rows equal encoded ones, are not encoded again, and are never stale."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldmole_dist.data.cache import encode_cached
from ldmole_dist.data.encode import Encoded, Encoder
from ldmole_dist.data.rows import Message, Row
from ldmole_dist.errors import UserError
from ldmole_dist.model.backbone import load_tokenizer
from tests.small_run import LABELS, make_backbone

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = (Message("user", "sky?"), Message("assistant", "blue"))
ROWS = [
    Row("The colour of rose is", " red", "line 1", "flowers"),
    Row("Which? A. sky B. sea", " blue", "line 2", choices=(" blue", " red")),
    Row("", "", "line 3", messages=TALK),
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("cache") / "backbone")


def make_encoder(backbone: Path, **settings: Any) -> Encoder:
    tokenizer = load_tokenizer(str(backbone))
    tokenizer.chat_template = settings.pop("template", TEMPLATE)
    return Encoder(tokenizer, **{"task": "causal_lm", "labels": None, "max_length": 90, "truncation": False} | settings)


def encode(encoder: Encoder, rows: list[Row], folder: Path) -> list[Encoded]:
    return encode_cached(encoder, rows, str(folder), "tokenizing", quiet=True, write=True)


def forbid_encoding(encoder: Encoder) -> Encoder:
    """Make `encoder` fail when it encodes a row."""

    def fail(row: Row) -> Encoded:
        raise AssertionError("encoded again")

    encoder.encode = fail  # type: ignore[method-assign]
    return encoder


def test_cached_rows_are_not_encoded_again(backbone: Path, tmp_path: Path) -> None:
    first = encode(make_encoder(backbone), ROWS, tmp_path)
    assert first == make_encoder(backbone)(ROWS, "tokenizing", quiet=True)
    assert encode(forbid_encoding(make_encoder(backbone)), ROWS, tmp_path) == first
    assert [e.domain for e in first] == ["flowers", None, None] and first[1].choices is not None


def test_classes_are_cached(backbone: Path, tmp_path: Path) -> None:
    def encoder() -> Encoder:
        return make_encoder(backbone, task="sequence_classification", labels=["red", "blue"])

    rows = [Row("rose", "red", "1"), Row("sky and sea", "blue", "2"), Row("jay", "blue", "3")]
    first = encode(encoder(), rows, tmp_path)
    assert encode(forbid_encoding(encoder()), rows, tmp_path) == first and [e.labels for e in first] == [0, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: (make_encoder(b), [*ROWS[:2], Row("", "", "", messages=(Message("user", "sea?"), TALK[1]))]),
        lambda b: (make_encoder(b), [Row("The colour of rose is", " blue", "line 1"), *ROWS[1:]]),
        lambda b: (make_encoder(b), ROWS[:2]),
        lambda b: (make_encoder(b, template=TEMPLATE.replace("[", "<")), ROWS),
        lambda b: (make_encoder(b, max_length=91), ROWS),
        lambda b: (make_encoder(b, truncation=True), ROWS),
        lambda b: (make_encoder(b, labels=LABELS), ROWS),
    ],
    ids=["conversation", "answer", "rows", "template", "max_length", "truncation", "labels"],
)
def test_changed_input_is_encoded_again(
    backbone: Path, tmp_path: Path, change: Callable[[Path], tuple[Encoder, list[Row]]]
) -> None:
    encode(make_encoder(backbone), ROWS, tmp_path)
    encoder, rows = change(backbone)
    with pytest.raises(AssertionError, match="encoded again"):
        encode(forbid_encoding(encoder), rows, tmp_path)


def test_changed_tokenizer_is_encoded_again(backbone: Path, tmp_path: Path) -> None:
    encode(make_encoder(backbone), ROWS, tmp_path)
    other = make_encoder(backbone)
    other.tokenizer.add_tokens(["rose"])
    with pytest.raises(AssertionError, match="encoded again"):
        encode(forbid_encoding(other), ROWS, tmp_path)


def test_damaged_file_is_replaced(backbone: Path, tmp_path: Path) -> None:
    first = encode(make_encoder(backbone), ROWS, tmp_path)
    (file,) = tmp_path.iterdir()
    complete = file.read_bytes()
    other = io.BytesIO()  # a whole file, but of one row
    np.savez(other, ids=np.zeros(3, np.int32), ends=np.array([3]), labels=np.zeros(3, np.int32))
    damages = (complete[:100], complete[:-40], b"", complete[:150] + b"x" + complete[151:], other.getvalue())
    for damaged in damages:
        file.write_bytes(damaged)
        assert encode(make_encoder(backbone), ROWS, tmp_path) == first
        assert encode(forbid_encoding(make_encoder(backbone)), ROWS, tmp_path) == first


def test_unwritable_folder_is_named(backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the token cache data.cache=.*file"):
        encode(make_encoder(backbone), ROWS, tmp_path / "file")
