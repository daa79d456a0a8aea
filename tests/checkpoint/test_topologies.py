"""A checkpoint resumes under any topology with bitwise the same state and equal training."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

from ldmole_dist.checkpoint.export import export_adapter, export_checkpoint
from ldmole_dist.checkpoint.files import ShardReader
from ldmole_dist.checkpoint.manifest import STATES, read_manifest, verify
from ldmole_dist.config import load_config
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.training.run import prepare
from tests.small_run import make_config, make_folder, run_training


class Topology(NamedTuple):
    stage: int
    ep_size: int
    world: int

    def __str__(self) -> str:
        return f"zero{self.stage}-ep{self.ep_size}-world{self.world}"


PAIRS = [
    ((0, 1, 1), (3, 2, 2)),
    ((0, 2, 2), (1, 4, 4)),
    ((0, 2, 4), (2, 1, 1)),
    ((1, 1, 2), (0, 1, 1)),
    ((1, 2, 4), (3, 4, 4)),
    ((1, 4, 4), (2, 1, 2)),
    ((2, 2, 2), (3, 1, 1)),
    ((2, 4, 4), (0, 2, 2)),
    ((2, 1, 4), (2, 2, 4)),
    ((3, 2, 2), (1, 1, 4)),
    ((3, 4, 4), (2, 2, 2)),
    ((3, 1, 1), (2, 4, 4)),
    ((3, 2, 4), (3, 1, 2)),
]
FULL = [((3, 4, 4), (2, 2, 2)), ((0, 2, 2), (1, 4, 4)), ((1, 1, 2), (0, 1, 1)), ((2, 1, 4), (2, 2, 4))]
FULL += [((2, 2, 2), (3, 1, 1))]
CASES = [
    pytest.param(Topology(*a), Topology(*b), id=f"{Topology(*a)} to {Topology(*b)}", marks=mark)
    for a, b in PAIRS
    for mark in [pytest.mark.full if (a, b) in FULL else pytest.mark.nightly]
]


class Runs:
    """Training runs by topology, each trained once."""

    def __init__(self, folder: Path, ranks: dict[int, LocalRanks]) -> None:
        self.folder, self.ranks = make_folder(folder), ranks
        self.config = make_config(
            folder,
            adapter={"lora_dropout": 0.0},
            # As in selftest.parity: a large eps keeps Adam from amplifying the rounding of gradients near 0.
            optimisation={"max_steps": 5, "learning_rate": 1e-3, "eps": 1e-4, "max_grad_norm": 0.3},
            data={"eval": None},
            run={"save_every": 2, "keep_last": 9},
        )

    def overrides(self, topology: Topology, run: Path) -> list[str]:
        name = f"zero{topology.stage}"
        if topology.stage == 3:  # below the default threshold tiny parameters are not partitioned
            path = self.folder / "zero3.json"
            path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
            name = str(path)
        return [f"parallelism.deepspeed={name}", f"parallelism.ep_size={topology.ep_size}", f"run.output_dir={run}"]

    def uninterrupted(self, topology: Topology) -> Path:
        """Return the folder of an uninterrupted run of 5 steps with a checkpoint after step 2."""
        run = self.folder / f"uninterrupted_{topology}"
        if not run.exists():
            self.ranks[topology.world].run(run_training, str(self.config), *self.overrides(topology, run))
        return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks1: LocalRanks, ranks2: LocalRanks, ranks4: LocalRanks) -> Runs:
    return Runs(tmp_path_factory.mktemp("topologies"), {1: ranks1, 2: ranks2, 4: ranks4})


def resave_and_train(config: str, overrides: list[str]) -> list[float]:
    """Load a checkpoint, save it again at once, then train to the end; runs on a rank."""
    trainer = prepare(load_config(config, overrides))
    trainer.saver.save(trainer.engine, trainer.first_step)
    trainer.saver.finish()
    trainer.run()
    export_adapter(trainer.engine, trainer.saver.folder.parent / "adapter", trainer.process)
    return [group["lr"] for group in trainer.engine.deepspeed.optimizer.param_groups]


def states(checkpoint: Path) -> dict[str, Tensor]:
    """Return every full master weight and moment of a checkpoint."""
    manifest = read_manifest(checkpoint)
    with ShardReader(checkpoint / name for name in manifest.rank_files()) as reader:
        return {
            f"{state}/{name}": reader.read_tensor(f"{state}/{name}", shape)
            for name, shape in manifest.shapes.items()
            for state in STATES
        }


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("source", "target"), CASES)
def test_loaded_state_is_bitwise_equal_and_training_agrees(
    runs: Runs, tmp_path: Path, source: Topology, target: Topology
) -> None:
    expected_run = runs.uninterrupted(source)
    checkpoint = expected_run / "checkpoints" / "step_00000002"
    assert verify(checkpoint) == []
    overrides = [*runs.overrides(target, tmp_path / "run"), f"run.resume={checkpoint}"]
    runs.ranks[target.world].run(resave_and_train, str(runs.config), overrides)

    again = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert verify(again) == []
    saved, loaded = states(checkpoint), states(again)
    assert saved.keys() == loaded.keys() and len(saved) == 3 * (2 * 7 * 3 + 2 * 4)
    for key, value in saved.items():
        assert value.isfinite().all() and loaded[key].equal(value), key
    assert any(value.abs().sum() > 0 for key, value in saved.items() if key.startswith("exp_avg_sq"))
    before, after = read_manifest(checkpoint), read_manifest(again)
    assert before.training["adam_step"] == after.training["adam_step"] == 2
    assert before.training["scheduler"] == after.training["scheduler"]
    assert before.training["counters"] == after.training["counters"]

    export_checkpoint(checkpoint, tmp_path / "at_2")
    start, expected, found = (
        weights(tmp_path / "at_2"),
        weights(expected_run / "adapter"),
        weights(tmp_path / "run" / "adapter"),
    )
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        assert (found[name] - value).norm() < 1e-4 * moved and moved > 0, name
    losses: list[Any] = [json.loads(x)["loss"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    uninterrupted = [json.loads(x)["loss"] for x in (expected_run / "metrics.jsonl").read_text().splitlines()][2:]
    assert losses == pytest.approx(uninterrupted, rel=1e-5) and len(losses) == 3
