"""Streamed rows equal rows in memory, for every number of readers, and need little memory."""

from __future__ import annotations

import json
import os
import pickle
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
from ldmole_dist.data.sources import RowParser, read_rows
from ldmole_dist.data.streaming import StreamedRows, index_part
from ldmole_dist.data.training_data import StreamedData
from ldmole_dist.errors import PeerError, UserError
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.training.run import prepare
from tests.launched import Launched
from tests.small_run import make_backbone, make_config, make_data, make_folder, run_training


def streamed(paths: list[str], parts: int, check: Callable[[Row], None] = lambda row: None) -> StreamedRows:
    sources = [Source(path=path) for path in paths]
    parsers = [RowParser(source, "causal_lm", None, named=len(paths) > 1) for source in sources]
    read = [
        [index_part(source, parser, check, part, parts, quiet=True) for part in range(parts)]
        for source, parser in zip(sources, parsers, strict=True)
    ]
    return StreamedRows(sources, parsers, read)


LINES = st.lists(st.sampled_from(["", "  ", "short", "ü" * 40, "a longer text " * 9]), min_size=1, max_size=120)


@settings(max_examples=40, deadline=None)
@given(texts=LINES, ends_in_newline=st.booleans())
def test_rows_are_independent_of_the_number_of_parts(
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
        assert [rows.row(i) for i in range(len(rows))] == expected  # including their location
        digests.add(rows.digest)
    assert len(digests) == 1


def test_files_are_concatenated(tmp_path: Path) -> None:
    paths = [str(make_data(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", 50), ("b", 70))]
    rows = streamed(paths, 3)
    expected = [row for of_file in read_rows([Source(path=p) for p in paths], "causal_lm", None) for row in of_file]
    assert rows.sizes == [50, 70] and [rows.row(i) for i in range(120)] == expected
    assert rows.digest != streamed(paths[::-1], 3).digest


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [("{", "not valid JSON"), ('{"prompt": 1}', "must hold a string"), ("[]", "expected a JSON object")],
)
def test_first_invalid_row_is_named(tmp_path: Path, parts: int, bad: str, reason: str) -> None:
    path = make_data(tmp_path / "rows.jsonl", 90)
    lines = path.read_text().splitlines()
    lines.insert(70, bad)
    lines.insert(20, "")
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"rows.jsonl, line 72: .*{reason}"):
        streamed([str(path)], parts)


@pytest.mark.parametrize("parts", [1, 3])
def test_row_that_cannot_be_encoded_is_named_before_training(folder: Path, tmp_path: Path, parts: int) -> None:
    encoder = training_data(folder, 0).encoder
    rows = [
        {"prompt": "sky", "completion": " x" * 13} for _ in range(60)
    ]  # 27 tokens with the end; long enough in bytes to be checked
    rows[40]["completion"] = " y" * 40
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="rows.jsonl, line 41: an answer of .* leaves no room for the prompt"):
        streamed([str(path)], parts, encoder.check)
    talk = {"messages": [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]}
    path.write_text(json.dumps(talk) + "\n")
    with pytest.raises(
        UserError, match="rows.jsonl, line 1: the row is a conversation, but .* tokenizer has no chat template"
    ):
        streamed([str(path)], parts, encoder.check)


def test_file_without_rows_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="has no rows"):
        streamed([str(tmp_path / "empty.jsonl")], 1)


def training_data(folder: Path, workers: int, world_size: int = 2, rank: int = 1) -> StreamedData:
    encoder = Encoder(load_tokenizer(str(folder / "backbone")), "causal_lm", None, 32, truncation=True)
    rows = streamed([str(folder / "train.jsonl")], 2, encoder.check)
    return StreamedData(rows, encoder, TrainingOrder(rows.lengths, 8, 2, world_size, seed=1), rank, workers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("streaming"))


def test_micro_batches_are_independent_of_workers(folder: Path) -> None:
    alone = training_data(folder, workers=0)
    expected = [alone.micro_batches(step) for step in range(9)]
    for workers in (1, 2):
        prefetched = training_data(folder, workers)
        # The first step is not 0, as after a resume, and one step is repeated.
        assert [prefetched.micro_batches(step) for step in (3, 4, 4, 5, 0, 6)] == [
            expected[s] for s in (3, 4, 4, 5, 0, 6)
        ]
        prefetched.close()


def test_data_can_be_sent_to_spawned_workers(folder: Path) -> None:
    data = training_data(folder, 0)
    assert pickle.loads(pickle.dumps(data)).micro_batches(1) == data.micro_batches(1)


def test_steps_equal_in_memory_data_for_every_world_size(folder: Path) -> None:
    (in_memory,) = read_rows(str(folder / "train.jsonl"), "causal_lm", None)
    order = TrainingOrder([1] * len(in_memory), 8, 2, 1, seed=1)
    encoder = training_data(folder, 0).encoder
    for step in range(9):
        expected = sorted(str(encoder.encode(in_memory[i])) for i in order.step(step))
        for world_size in (1, 2, 4):
            by_rank = [training_data(folder, 0, world_size, rank).micro_batches(step) for rank in range(world_size)]
            assert sorted(str(e) for batches in by_rank for batch in batches for e in batch) == expected


def test_error_in_a_worker_keeps_its_message(folder: Path, tmp_path: Path) -> None:
    data = training_data(folder, workers=1)
    data.rows.parsers[0].labels = ["nothing"]
    with pytest.raises(UserError) as raised:
        data.micro_batches(0)
    data.close()
    assert str(raised.value).startswith(str(folder / "train.jsonl")) and "Traceback" not in str(raised.value)


@pytest.mark.full
def test_resumed_streamed_run_equals_uninterrupted_run(folder: Path, ranks2: LocalRanks) -> None:
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
    resumed = [json.loads(line) for line in (folder / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in read], rel=1e-5)


@pytest.mark.full
def test_launched_run_with_workers_exits(folder: Path) -> None:
    data = {"streaming": True, "truncation": True, "workers": 2}
    config = make_config(folder, data=data, run={"output_dir": str(folder / "launched")})
    with Launched(config) as run:
        codes, output = run.wait(200)
    assert codes == [0, 0], output
    assert (folder / "launched" / "adapter" / "adapter_model.safetensors").exists()


def train_on_changed_file(config: str) -> str:
    """Run on ranks: invalidate the rows of one of the two ranks after the check, and return the error of the run."""
    trainer = prepare(load_config(config, []))
    if trainer.process.is_main:
        trainer.data.rows.parsers[0].labels = ["nothing"]  # type: ignore[attr-defined]
    with pytest.raises((UserError, PeerError)) as raised:
        trainer.run()
    return f"{type(raised.value).__name__}: {raised.value}"


def test_error_on_one_rank_stops_all_ranks(folder: Path, ranks2: LocalRanks) -> None:
    data = {"streaming": True, "truncation": True, "eval": None}
    config = make_config(folder, data=data, run={"output_dir": str(folder / "spoilt")})
    first, second = ranks2.run(train_on_changed_file, str(config))
    assert first.startswith("UserError") and "is not in data.labels" in first
    assert second.startswith("PeerError: rank 0 failed while reading the rows of step 1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["data.streaming=true"], "needs data.truncation=true"),
        (["data.workers=2"], "has no effect without data.streaming=true"),
        (["data.streaming=true", "data.truncation=true", "data.train=x.csv"], "reads only .jsonl files, not x.csv"),
        (
            ["data.streaming=true", "data.truncation=true", "data.train=[{task: rte}]"],
            "reads only .jsonl files, not rte",
        ),
    ],
)
def test_invalid_settings_are_rejected(tmp_path: Path, override: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(str(make_config(tmp_path)), override)


MEASURE = """
import re, sys
from pathlib import Path
from transformers import AutoTokenizer
from ldmole_dist.config import Source
from ldmole_dist.data.batches import TrainingOrder
from ldmole_dist.data.encode import Encoder
from ldmole_dist.data.sources import RowParser
from ldmole_dist.data.streaming import StreamedRows, index_part
from ldmole_dist.data.training_data import StreamedData

def peak():  # not getrusage: its maximum includes the memory of the parent process before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder = Path(sys.argv[1])
encoder = Encoder(AutoTokenizer.from_pretrained(folder / "backbone"), "causal_lm", None, 32, truncation=True)
before = peak()
source = Source(path=str(folder / "train.jsonl"))
parser = RowParser(source, "causal_lm", None, named=False)
rows = StreamedRows([source], [parser], [[index_part(source, parser, encoder.check, 0, 1, quiet=True)]])
data = StreamedData(rows, encoder, TrainingOrder(rows.lengths, 64, 8, 1, seed=1), 0, workers=0)
for step in range(200):
    data.micro_batches(step)
print(len(rows), before, peak())
"""


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_large_file_needs_little_memory(tmp_path: Path) -> None:
    """Check half a gigabyte (or LDMOLE_STREAM_GB) of rows and read 200 steps of them."""
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
    assert rows > size / 800 and peak - before < 100 * 2**20  # excludes the memory of the imported libraries
