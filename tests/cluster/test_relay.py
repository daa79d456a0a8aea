"""What a rank prints, in a log."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from ldmole_dist.cluster import relay
from ldmole_dist.cluster.relay import Relay


def passed_on(script: str) -> tuple[bytes, Relay]:
    """What a log gets of the output of a Python script."""
    read, write = os.pipe()
    child: Any = subprocess.Popen([sys.executable, "-u", "-c", script], stdout=subprocess.PIPE)
    copier = Relay(child.stdout, write)
    copier.run()
    os.close(write)
    child.wait()
    with os.fdopen(read, "rb") as log:
        return log.read(), copier


def test_lines_arrive_as_they_are() -> None:
    log, copier = passed_on(r"print('one\n\ntwo'); print('three', end='')")
    assert log == b"one\n\ntwo\nthree" and copier.last_lines(2) == ["two", "three"]


def test_of_a_bar_only_its_last_state_stays() -> None:
    script = r"""
import sys
for i in range(5): sys.stdout.write(f"\rstep {i}"); sys.stdout.flush()
print("\nerror: no"); print("\x1b[A", end="")
"""
    log, copier = passed_on(script)
    assert log == b"step 4\nerror: no\n" and copier.last_lines(2)[0] == "error: no"


def test_a_long_running_bar_is_seen_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "REDRAWN_SECONDS", 0.25)
    script = r"""
import sys, time
for i in range(10): sys.stdout.write(f"\rstep {i}"); sys.stdout.flush(); time.sleep(0.1)
"""
    log, _ = passed_on(script)
    lines = log.decode().split("\n")
    assert 2 <= len(lines) <= 5 and all(line.strip("\r").startswith("step ") for line in lines), log


def test_a_reader_that_is_gone_is_noticed() -> None:
    read, write = os.pipe()
    os.close(read)
    child: Any = subprocess.Popen([sys.executable, "-c", "print('x' * 100000)"], stdout=subprocess.PIPE)
    copier = Relay(child.stdout, write)
    copier.run()
    os.close(write)
    assert copier.broken and child.wait() == 0  # the rank itself is not held up
