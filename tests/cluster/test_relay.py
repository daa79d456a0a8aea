"""Output of a rank as it arrives in a log."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from ldmole_dist.cluster import relay
from ldmole_dist.cluster.relay import Relay


def relay_output(script: str) -> tuple[bytes, Relay]:
    """Return what arrives in a log of the output of a Python script, and the relay."""
    read, write = os.pipe()
    child: Any = subprocess.Popen([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE)
    thread = Relay(child.stdout, write)
    thread.run()
    os.close(write)
    child.wait()
    with os.fdopen(read, "rb") as log:
        return log.read(), thread


def test_lines_are_copied_unchanged() -> None:
    log, thread = relay_output(r"print('one\n\ntwo'); print('three', end='')")
    assert log == b"one\n\ntwo\nthree" and thread.last_lines(2) == ["two", "three"]


def test_only_the_last_state_of_a_progress_bar_is_copied() -> None:
    script = r"""
import sys
for i in range(5): sys.stdout.write(f"\rstep {i}"); sys.stdout.flush()
print("\nerror: no"); print("\x1b[A", end="")
"""
    log, thread = relay_output(script)
    assert log == b"step 4\nerror: no\n" and thread.last_lines(2)[0] == "error: no"


def test_slow_progress_bar_is_copied_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "PROGRESS_BAR_SECONDS", 0.25)
    script = r"""
import sys, time
for i in range(10): sys.stdout.write(f"\rstep {i}"); sys.stdout.flush(); time.sleep(0.1)
"""
    log, _ = relay_output(script)
    lines = log.decode().split("\n")
    assert 2 <= len(lines) <= 5 and all(line.strip("\r").startswith("step ") for line in lines), log


def test_missing_reader_is_detected_and_does_not_block_the_rank() -> None:
    read, write = os.pipe()
    os.close(read)
    child: Any = subprocess.Popen([sys.executable, "-c", "print('x' * 100000)"], stdout=subprocess.PIPE)
    thread = Relay(child.stdout, write)
    thread.run()
    os.close(write)
    assert thread.broken and child.wait() == 0
