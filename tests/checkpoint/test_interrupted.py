"""Runs that are asked to end save and go on; runs that are killed at any moment go on from the last whole checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ldmole_dist.checkpoint.load import newest
from ldmole_dist.checkpoint.manifest import verify
from ldmole_dist.distributed import free_port
from ldmole_dist.errors import EXIT_PREEMPTED
from tests.launched import Launched
from tests.small_run import make_config, make_folder


class Run:
    """A config and the folder that its runs write to."""

    def __init__(self, folder: Path, steps: int, save_every: int) -> None:
        self.config = make_config(
            folder,
            optimisation={"max_steps": steps, "global_batch_size": 4},
            run={"output_dir": str(folder / "run"), "save_every": save_every},
            data={"eval": None},
        )
        self.folder = folder / "run"

    def steps(self) -> int:
        """Done so far, by the last whole line of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def finish(self, *overrides: str) -> str:
        """Start it and let it end."""
        with Launched(self.config, *overrides) as launched:
            codes, output = launched.wait(timeout=120)
        assert codes == [0, 0], output
        return output

    def same_as(self, other: Run) -> bool:
        """Whether both ended with the same parameters, bit for bit, and reported each step once."""
        mine, theirs = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (self, other))
        losses = [
            [(json.loads(x)["step"], json.loads(x)["loss"]) for x in (run.folder / "metrics.jsonl").open()]
            for run in (self, other)
        ]
        return losses[0] == losses[1] and all(mine[name].equal(value) for name, value in theirs.items())


def wait_until(condition: Callable[[], bool], launched: Launched, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while launched.running and not condition():
        assert time.monotonic() < deadline, "it did not get there"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run."""
    run = Run(make_folder(tmp_path_factory.mktemp("whole")), steps=60, save_every=4)
    run.finish()
    return run


def fresh(tmp_path: Path, like: Run) -> Run:
    # The same files: another folder's would be equal, but not by name.
    run = Run(like.folder.parent, steps=60, save_every=4)
    text = run.config.read_text().replace(str(run.folder), str(tmp_path / "run"))
    run.config, run.folder = tmp_path / "config.yaml", tmp_path / "run"
    run.config.write_text(text)
    return run


@pytest.mark.full
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_run_that_is_asked_to_end_saves_and_goes_on(
    tmp_path: Path, whole: Run, number: signal.Signals, rank: int
) -> None:
    run = fresh(tmp_path, whole)
    with Launched(run.config, "run.save_every=0") as launched:
        wait_until(lambda: run.steps() >= 3, launched)
        launched.ranks[rank].send_signal(number)
        codes, output = launched.wait(timeout=60)
    assert codes == [EXIT_PREEMPTED, EXIT_PREEMPTED] and "Traceback" not in output, output
    (checkpoint,) = newest(run.folder)
    assert f"saved after step {run.steps()} of 60" in output and verify(checkpoint) == []
    assert checkpoint.name == f"step_{run.steps():08d}"
    run.finish()
    assert run.same_as(whole)


@pytest.mark.full
def test_ctrl_c_under_deepspeeds_launcher_saves(tmp_path: Path, whole: Run) -> None:
    run = fresh(tmp_path, whole)
    train = Path(__file__).parents[2] / "launch" / "train.py"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launcher = subprocess.Popen(
        [*command, "--master_port", str(free_port()), str(train), str(run.config), "run.save_every=0"],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while run.steps() < 3 and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
        output, _ = launcher.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode != 0
    (checkpoint,) = newest(run.folder)
    assert verify(checkpoint) == [] and f"saved after step {run.steps()} of 60" in output, output
    assert checkpoint.name == f"step_{run.steps():08d}"


@pytest.mark.full
def test_after_the_death_of_a_peer_nobody_saves(tmp_path: Path, whole: Run) -> None:
    run = fresh(tmp_path, whole)
    with Launched(run.config, "run.save_every=0") as launched:
        wait_until(lambda: run.steps() >= 2, launched)
        launched.ranks[1].kill()
        launched.ranks[0].send_signal(signal.SIGTERM)
        codes, output = launched.wait(timeout=60)
    assert codes[0] not in (0, EXIT_PREEMPTED), output
    assert newest(run.folder) == []


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "kills", [pytest.param(5, marks=pytest.mark.full), pytest.param(20, marks=pytest.mark.nightly)]
)
def test_run_killed_at_random_moments_equals_the_uninterrupted_one(tmp_path: Path, whole: Run, kills: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    run = fresh(tmp_path, whole)
    inside = 0
    same = ["run.save_every=1", "run.keep_last=3"]
    for kill in range(kills):
        before, started = run.steps(), time.time()

        def saving(since: float = started) -> bool:
            # Not what an earlier kill has left, which is removed when the next save begins.
            with contextlib.suppress(FileNotFoundError):
                return any(path.stat().st_mtime > since for path in run.folder.glob("checkpoints/.step_*"))
            return False

        with Launched(run.config, *same) as launched:
            if kill % 2:
                wait_until(saving, launched)
                time.sleep(draw.uniform(0, 0.004))
            else:
                after = before + draw.randint(1, 2)
                wait_until(lambda after=after: run.steps() >= after, launched)  # type: ignore[misc]
                time.sleep(draw.uniform(0, 0.2))
            if draw.random() < 0.5:
                alone = draw.randrange(2)
                launched.ranks[alone].kill()
                launched.ranks[1 - alone].wait(timeout=90)  # it ends by itself, its peer being gone
            launched.kill()
        inside += saving()
        assert run.steps() < 60, f"seed {seed}: it ended before it was killed {kills} times"
        if found := newest(run.folder):
            assert verify(found[0]) == [], f"seed {seed}, kill {kill}"
    assert inside >= kills // 4, f"seed {seed}: only {inside} kills were inside a save"
    run.finish(*same)
    assert run.same_as(whole), f"seed {seed}"
