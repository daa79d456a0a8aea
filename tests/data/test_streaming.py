"""Rows that stay on the disk: the same as in memory, whatever shares the reading, and little memory however many there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmole_dist.config import Source, load_config
from ldmole_dist.data.batches import TrainingOrder
from ldmole_dist.data.encode import Encoder
from ldmole_dist.data.rows import Row
from ldmole_dist.data.sources import RowMaker, read_rows
from ldmole_dist.data.streaming import StreamedRows, read_part
from ldmole_dist.data.training_data import Streamed
from ldmole_dist.errors import PeerError, UserError
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.training.run import prepare
from tests.launched import Launched
from tests.small_run import make_backbone, make_config, make_data, make_folder, run_training


def streamed(paths: list[str], parts: int, check: Callable[[Row], None] = lambda row: None) -> StreamedRows:
    sources = [Source(path=path) for path in paths]
    makers = [RowMaker(source, "causal_lm", None, named=len(paths) > 1) for source in sources]
    read = [
        [read_part(source, maker, check, part, parts, quiet=True) for part in range(parts)]
        for source, maker in zip(sources, makers, strict=True)
    ]
    return StreamedRows(sources, makers, read)


LINES = st.lists(st.sampled_from(["", "  ", "short", "ü" * 40, "a longer text " * 9]), min_size=1, max_size=120)


@settings(max_examples=40, deadline=None)
@given(texts=LINES, ends_in_newline=st.booleans())
def test_the_rows_of_a_file_for_any_number_of_parts(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ends_in_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = ["first", *texts]
    lines = [json.dumps({"text": f"{t} {n}"}, ensure_ascii=False) if t.strip() else t for n, t in enumerate(texts)]
    path.write_bytes(("\n".join(lines) + "\n" * ends_in_newline).encode())
    (expected,) = read_rows(str(path), "causal_lm", None)
    digests = set()
    for parts in (1, 2, 3, 7):
        rows = streamed([str(path)], parts)
        assert [rows.row(i) for i in range(len(rows))] == expected  # its place in the file included
        digests.add(rows.digest)
    assert len(digests) == 1


def test_several_files(tmp_path: Path) -> None:
    paths = [str(make_data(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", 50), ("b", 70))]
    rows = streamed(paths, 3)
    expected = [row for of_file in read_rows([Source(path=p) for p in paths], "causal_lm", None) for row in of_file]
    assert rows.sizes == [50, 70] and [rows.row(i) for i in range(120)] == expected
    assert rows.digest != streamed(paths[::-1], 3).digest


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize(
    ("bad", "reason"), [("{", "not a JSON object"), ('{"prompt": 1}', "needs a text"), ("[]", "must be")]
)
def test_the_first_bad_row_is_named(tmp_path: Path, parts: int, bad: str, reason: str) -> None:
    path = make_data(tmp_path / "rows.jsonl", 90)
    lines = path.read_text().splitlines()
    lines.insert(70, bad)
    lines.insert(20, "")
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"rows.jsonl, line 72: .*{reason}"):
        streamed([str(path)], parts)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_row_that_cannot_be_encoded_is_named_before_it_is_trained_on(
    folder: Path, tmp_path: Path, parts: int
) -> None:
    encoder = training_data(folder, 0).encoder
    rows = [
        {"prompt": "sky", "completion": " x" * 13} for _ in range(60)
    ]  # 27 tokens with the end; in doubt by their bytes
    rows[40]["completion"] = " y" * 40
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="rows.jsonl, line 41: nothing is left to read beside an answer of"):
        streamed([str(path)], parts, encoder.check)
    talk = {"messages": [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]}
    path.write_text(json.dumps(talk) + "\n")
    with pytest.raises(
        UserError, match="rows.jsonl, line 1: is a conversation, and the tokenizer .* has no chat template"
    ):
        streamed([str(path)], parts, encoder.check)


def test_a_file_without_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no rows"):
        streamed([str(tmp_path / "empty.jsonl")], 1)


def training_data(folder: Path, workers: int, world_size: int = 2, rank: int = 1) -> Streamed:
    encoder = Encoder(load_tokenizer(str(folder / "backbone")), "causal_lm", None, 32, truncation=True)
    rows = streamed([str(folder / "train.jsonl")], 2, encoder.check)
    return Streamed(rows, encoder, TrainingOrder(rows.lengths, 8, 2, world_size, seed=1), rank, workers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("streaming"))


def test_workers_change_nothing(folder: Path) -> None:
    alone = training_data(folder, workers=0)
    expected = [alone.micro_batches(step) for step in range(9)]
    for workers in (1, 2):
        ahead = training_data(folder, workers)
        # Begun in the middle, as after a resume; one step is looked at again.
        assert [ahead.micro_batches(step) for step in (3, 4, 4, 5, 0, 6)] == [expected[s] for s in (3, 4, 4, 5, 0, 6)]
        ahead.close()


def test_the_same_examples_as_in_memory_at_every_step_and_for_any_number_of_ranks(folder: Path) -> None:
    (in_memory,) = read_rows(str(folder / "train.jsonl"), "causal_lm", None)
    order = TrainingOrder([1] * len(in_memory), 8, 2, 1, seed=1)
    encoder = training_data(folder, 0).encoder
    for step in range(9):
        expected = sorted(str(encoder.encode(in_memory[i])) for i in order.step(step))
        for world_size in (1, 2, 4):
            of_ranks = [training_data(folder, 0, world_size, rank).micro_batches(step) for rank in range(world_size)]
            assert sorted(str(e) for of_rank in of_ranks for batch in of_rank for e in batch) == expected


def test_a_workers_error_arrives_as_it_was_said(folder: Path, tmp_path: Path) -> None:
    data = training_data(folder, workers=1)
    data.rows.makers[0].labels = ["nothing"]
    with pytest.raises(UserError) as raised:
        data.micro_batches(0)
    data.close()
    assert str(raised.value).startswith(str(folder / "train.jsonl")) and "Traceback" not in str(raised.value)


@pytest.mark.full
def test_a_streamed_run_goes_on_as_if_it_had_not_stopped(folder: Path, ranks2: LocalRanks) -> None:
    stream = {"streaming": True, "truncation": True}
    config = str(make_config(folder, data=stream, adapter={"lora_dropout": 0.0}))
    parts = f"run.output_dir={folder}/parts"
    ranks2.run(
        run_training, config, parts, "run.save_every=3", "optimisation.max_steps=3", "optimisation.schedule=constant"
    )
    ranks2.run(run_training, config, parts, "optimisation.schedule=constant")
    again = f"run.output_dir={folder}/constant"
    ranks2.run(run_training, config, again, "optimisation.schedule=constant")
    read = [json.loads(line) for line in (folder / "constant" / "metrics.jsonl").read_text().splitlines()]
    gone_on = [json.loads(line) for line in (folder / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in gone_on] == pytest.approx([line["loss"] for line in read], rel=1e-5)


@pytest.mark.full
def test_a_launched_run_with_workers_ends(folder: Path) -> None:
    data = {"streaming": True, "truncation": True, "workers": 2}
    config = make_config(folder, data=data, run={"output_dir": str(folder / "launched")})
    with Launched(config) as run:
        codes, said = run.wait(200)
    assert codes == [0, 0], said
    assert (folder / "launched" / "adapter" / "adapter_model.safetensors").exists()


def train_on_a_file_that_changes(config: str) -> str:
    """Sent to ranks: the rows are spoilt after they were checked, all that one of the two ranks has in a later step."""
    trainer = prepare(load_config(config, []))
    if trainer.process.is_main:
        trainer.data.rows.makers[0].labels = ["nothing"]  # type: ignore[attr-defined]
    with pytest.raises((UserError, PeerError)) as raised:
        trainer.run()
    return f"{type(raised.value).__name__}: {raised.value}"


def test_an_error_of_one_rank_is_one_of_all(folder: Path, ranks2: LocalRanks) -> None:
    data = {"streaming": True, "truncation": True, "eval": None}
    config = make_config(folder, data=data, run={"output_dir": str(folder / "spoilt")})
    first, second = ranks2.run(train_on_a_file_that_changes, str(config))
    assert first.startswith("UserError") and "is none of data.labels" in first
    assert second.startswith("PeerError: rank 0 failed while reading the rows of step 1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["data.streaming=true"], "needs data.truncation=true"),
        (["data.workers=2"], "is for data.streaming=true"),
        (["data.streaming=true", "data.truncation=true", "data.train=x.csv"], "reads .jsonl files, not x.csv"),
        (["data.streaming=true", "data.truncation=true", "data.train=[{task: rte}]"], "reads .jsonl files, not rte"),
    ],
)
def test_bad_settings(tmp_path: Path, override: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(str(make_config(tmp_path)), override)


MEASURE = """
import re, sys
from pathlib import Path
from transformers import AutoTokenizer
from ldmole_dist.config import Source
from ldmole_dist.data.batches import TrainingOrder
from ldmole_dist.data.encode import Encoder
from ldmole_dist.data.sources import RowMaker
from ldmole_dist.data.streaming import StreamedRows, read_part
from ldmole_dist.data.training_data import Streamed

def peak():  # of this program; getrusage would say that of the process that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder = Path(sys.argv[1])
encoder = Encoder(AutoTokenizer.from_pretrained(folder / "backbone"), "causal_lm", None, 32, truncation=True)
before = peak()
source = Source(path=str(folder / "train.jsonl"))
maker = RowMaker(source, "causal_lm", None, named=False)
rows = StreamedRows([source], [maker], [[read_part(source, maker, encoder.check, 0, 1, quiet=True)]])
data = Streamed(rows, encoder, TrainingOrder(rows.lengths, 64, 8, 1, seed=1), 0, workers=0)
for step in range(200):
    data.micro_batches(step)
print(len(rows), before, peak())
"""


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    """Half a gigabyte, or as many as LDMOLE_STREAM_GB says; read, checked, and 200 steps of rows from all over it."""
    size = float(os.environ.get("LDMOLE_STREAM_GB", 0.5)) * 2**30
    make_backbone(tmp_path / "backbone")
    block = "".join(
        json.dumps({"prompt": "x" * (500 + n % 300), "completion": " blue"}) + "\n" for n in range(4096)
    ).encode()
    with (tmp_path / "train.jsonl").open("wb") as file:
        while file.tell() < size:
            file.write(block)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    measured: Any = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1400).stdout.split()
    (tmp_path / "train.jsonl").unlink()
    rows, before, peak = map(int, measured)
    print(f"{size / 2**30} GB, {rows} rows: {before / 2**20:.0f} MB before, {peak / 2**20:.0f} MB at most")
    assert rows > size / 800 and peak - before < 100 * 2**20  # what importing the libraries takes is not the file's
