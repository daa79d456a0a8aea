"""Ranks on this machine: which errors keep their processes, and that the processes end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from ldmole_dist.errors import UserError
from ldmole_dist.selftest.local_ranks import LocalRanks, RankFailed


def refuse(ranks: list[int], error: type[Exception]) -> None:
    if dist.get_rank() in ranks:
        raise error("refused")


def test_refusal_of_all_ranks_keeps_the_processes(ranks2: LocalRanks) -> None:
    processes = ranks2.run(os.getpid)
    with pytest.raises(RankFailed, match="refuse failed on rank [01]:(.|\n)*UserError: refused"):
        ranks2.run(refuse, [0, 1], UserError)
    assert ranks2.run(os.getpid) == processes


@pytest.mark.parametrize(("ranks", "error"), [([1], UserError), ([0, 1], ValueError)])
def test_other_errors_replace_the_processes(ranks2: LocalRanks, ranks: list[int], error: type[Exception]) -> None:
    processes = ranks2.run(os.getpid)
    with pytest.raises(RankFailed, match=f"refuse failed on rank [01]:(.|\n)*{error.__name__}: refused"):
        ranks2.run(refuse, ranks, error)
    assert not set(ranks2.run(os.getpid)) & set(processes)


PARENT = """
import signal, time
from ldmole_dist.selftest.local_ranks import LocalRanks
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a shell
    ranks = LocalRanks(2)
    ranks.run(time.time)
    print("started", flush=True)
    ranks.run(time.sleep, 1000)
"""


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_and_fork_server_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "started\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) >= 3  # the fork server and two ranks
        # A terminal's Ctrl-C reaches all processes; only the parent reacts to it.
        for process in [*children, parent] if number == signal.SIGINT else [parent]:
            process.send_signal(number)
        parent.wait(timeout=60)
    deadline = time.monotonic() + 60
    while left := [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
