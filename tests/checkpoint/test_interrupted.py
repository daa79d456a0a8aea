"""Runs save on a stop signal and resume; runs killed at any moment resume from the latest complete checkpoint."""

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

from ldmole_dist.checkpoint.load import list_checkpoints
from ldmole_dist.checkpoint.manifest import verify
from ldmole_dist.distributed import free_port
from ldmole_dist.errors import EXIT_PREEMPTED
from tests.launched import Launched
from tests.small_run import make_config, make_folder


class Run:
    """Config of a run and its output folder."""

    def __init__(self, folder: Path, steps: int, save_every: int) -> None:
        self.config = make_config(
            folder,
            optimisation={"max_steps": steps, "global_batch_size": 4},
            run={"output_dir": str(folder / "run"), "save_every": save_every},
            data={"eval": None},
        )
        self.folder = folder / "run"

    def steps(self) -> int:
        """Return the number of steps done, according to the last complete line of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def finish(self, *overrides: str) -> str:
        """Run it to the end and return its output."""
        with Launched(self.config, *overrides) as launched:
            codes, output = launched.wait(timeout=120)
        assert codes == [0, 0], output
        return output

    def equals(self, other: Run) -> bool:
        """Return whether both runs ended with bitwise the same parameters and the same reported losses."""
        mine, theirs = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (self, other))
        losses = [
            [(json.loads(x)["step"], json.loads(x)["loss"]) for x in (run.folder / "metrics.jsonl").open()]
            for run in (self, other)
        ]
        return losses[0] == losses[1] and all(mine[name].equal(value) for name, value in theirs.items())


def wait_until(condition: Callable[[], bool], launched: Launched, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while launched.running and not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.001)


STEPS = 24


def finished(folder: Path, steps: int) -> Run:
    """Return a finished run that was not interrupted."""
    run = Run(make_folder(folder), steps, save_every=4)
    run.finish()
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished(tmp_path_factory.mktemp("uninterrupted"), STEPS)


def fresh(tmp_path: Path, like: Run, steps: int = STEPS) -> Run:
    # It uses the same backbone and data files, whose paths are part of the config.
    run = Run(like.folder.parent, steps, save_every=4)
    text = run.config.read_text().replace(str(run.folder), str(tmp_path / "run"))
    run.config, run.folder = tmp_path / "config.yaml", tmp_path / "run"
    run.config.write_text(text)
    return run


@pytest.mark.full
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_run_saves_on_a_stop_signal_and_resumes(
    tmp_path: Path, uninterrupted: Run, number: signal.Signals, rank: int
) -> None:
    run = fresh(tmp_path, uninterrupted)
    with Launched(run.config, "run.save_every=0") as launched:
        wait_until(lambda: run.steps() >= 3, launched)
        launched.ranks[rank].send_signal(number)
        codes, output = launched.wait(timeout=60)
    assert codes == [EXIT_PREEMPTED, EXIT_PREEMPTED] and "Traceback" not in output, output
    (checkpoint,) = list_checkpoints(run.folder)
    assert f"saved after step {run.steps()} of {STEPS}" in output and verify(checkpoint) == []
    assert checkpoint.name == f"step_{run.steps():08d}"
    run.finish()
    assert run.equals(uninterrupted)


@pytest.mark.full
def test_ctrl_c_under_the_deepspeed_launcher_saves(tmp_path: Path, uninterrupted: Run) -> None:
    run = fresh(tmp_path, uninterrupted)
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
        os.killpg(launcher.pid, signal.SIGINT)  # a terminal signals the whole process group
        output, _ = launcher.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode != 0
    (checkpoint,) = list_checkpoints(run.folder)
    assert verify(checkpoint) == [] and f"saved after step {run.steps()} of {STEPS}" in output, output
    assert checkpoint.name == f"step_{run.steps():08d}"


@pytest.mark.full
def test_no_rank_saves_after_a_peer_died(tmp_path: Path, uninterrupted: Run) -> None:
    run = fresh(tmp_path, uninterrupted)
    with Launched(run.config, "run.save_every=0") as launched:
        wait_until(lambda: run.steps() >= 2, launched)
        launched.ranks[1].kill()
        launched.ranks[0].send_signal(signal.SIGTERM)
        codes, output = launched.wait(timeout=60)
    assert codes[0] not in (0, EXIT_PREEMPTED), output
    assert list_checkpoints(run.folder) == []


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kills", "steps"),
    [pytest.param(5, STEPS, marks=pytest.mark.full), pytest.param(20, 60, marks=pytest.mark.nightly)],
)
def test_run_killed_at_random_moments_equals_the_uninterrupted_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, uninterrupted: Run, kills: int, steps: int
) -> None:
    if steps != STEPS:
        uninterrupted = finished(tmp_path_factory.mktemp("longer"), steps)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    run = fresh(tmp_path, uninterrupted, steps)
    inside = 0
    same = ["run.save_every=1", "run.keep_last=3"]
    for kill in range(kills):
        before, started = run.steps(), time.time()

        def saving(since: float = started) -> bool:
            # Ignore what an earlier kill left; it is removed when the next save starts.
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
                launched.ranks[1 - alone].wait(timeout=90)  # the surviving rank exits by itself
            launched.kill()
        inside += saving()
        assert run.steps() < steps, f"seed {seed}: the run ended before it was killed {kills} times"
        if found := list_checkpoints(run.folder):
            assert verify(found[0]) == [], f"seed {seed}, kill {kill}"
    assert inside >= kills // 4, f"seed {seed}: only {inside} kills were inside a save"
    run.finish(*same)
    assert run.equals(uninterrupted), f"seed {seed}"
