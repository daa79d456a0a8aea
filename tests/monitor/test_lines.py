"""JSON-lines files of a run after a crash and on a full disk."""

import json
from pathlib import Path

import pytest

from ldmole_dist.io import read_lines
from ldmole_dist.monitor.lines import JsonLines


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in read_lines(path)]


def test_later_and_incomplete_lines_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 0)
    for step in (1, 2, 3):
        first.append(step, {"loss": 1.0 / step})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert steps(path) == [1, 2, 3]
    again = JsonLines(path, 2)
    again.append(3, {"loss": 0.5})
    again.close()
    assert steps(path) == [1, 2, 3] and json.loads(path.read_text().splitlines()[-1])["loss"] == 0.5
    JsonLines(path, 9).close()
    assert steps(path) == [1, 2, 3]


def test_nonfinite_numbers_become_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "x.jsonl", 0)
    lines.append(1, {"norm": float("inf"), "parts": {"A": float("nan"), "B": [1.0, float("-inf")]}})
    lines.close()
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {
        "step": 1,
        "norm": None,
        "parts": {"A": None, "B": [1.0, None]},
    }


def test_close_does_not_retry_a_failed_write() -> None:
    lines = JsonLines.__new__(JsonLines)
    lines._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        lines.append(1, {"loss": 1.0})
    lines.close()  # nothing is buffered that could fail again
