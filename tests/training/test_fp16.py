"""fp16 with a loss scale: the loss falls, and steps whose gradients overflow are skipped and counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from ldmole_dist.checkpoint.manifest import read_manifest
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.checkpoint.test_topologies import states
from tests.small_run import make_config, make_folder, run_training


def lines(path: Path) -> list[dict[str, Any]]:
    """Parse JSON lines strictly: Infinity and NaN, which JSON lacks, fail the test."""
    refuse = {"parse_constant": lambda value: pytest.fail(f"{value} is not JSON")}
    return [json.loads(line, **refuse) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "stage", [2, pytest.param(3, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.nightly)]
)
def test_overflowing_steps_are_skipped_and_gradients_unscaled(tmp_path: Path, ranks2: LocalRanks, stage: int) -> None:
    ds_config = tmp_path / "zero.json"
    # The initial loss scale is so large that gradients overflow in the first steps.
    fp16 = {"initial_scale_power": 19, "hysteresis": 1}
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "fp16": fp16}))
    optimisation = {"max_steps": 8, "global_batch_size": 8}
    config = make_config(
        make_folder(tmp_path), adapter={"lora_dropout": 0.0}, optimisation=optimisation, run={"detail_every": 1}
    )
    frozen = ["parallelism.precision=fp32", "optimisation.learning_rate=1e-30", "data.eval=null"]
    ranks2.run(run_training, str(config), *frozen, f"run.output_dir={tmp_path / 'frozen'}")
    ranks2.run(run_training, str(config), "parallelism.precision=fp16", f"parallelism.deepspeed={ds_config}")

    steps = lines(tmp_path / "run" / "metrics.jsonl")
    skipped = [step["grad_norm"] is None for step in steps]
    assert skipped[0] and steps[-1]["skipped_steps"] == sum(skipped) < 6
    assert [None in step["grad_norm_by_part"].values() for step in steps] == skipped
    # The first step that is not skipped starts from the initial parameters, so both runs compute the same gradients.
    first = skipped.index(False)
    expected = lines(tmp_path / "frozen" / "metrics.jsonl")[first]
    assert steps[first]["loss"] == pytest.approx(expected["loss"], rel=0.01)
    assert steps[first]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
    before, after = lines(tmp_path / "run" / "evaluations.jsonl")
    assert after["eval_loss"] < before["eval_loss"] - 0.1


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.full), *(pytest.param(n, marks=pytest.mark.nightly) for n in (2, 3))]
)
def test_growing_loss_scale_does_not_change_gradients(tmp_path: Path, ranks2: LocalRanks, stage: int) -> None:
    ds_config = tmp_path / "zero.json"
    fp16 = {"initial_scale_power": 4, "loss_scale_window": 2}
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "fp16": fp16}))
    optimisation = {"max_steps": 6, "global_batch_size": 8, "learning_rate": 1e-30, "max_grad_norm": 0.0}
    run = {"save_every": 6}
    config = make_config(
        make_folder(tmp_path), adapter={"lora_dropout": 0.0}, optimisation=optimisation, data={"eval": None}, run=run
    )
    ranks2.run(run_training, str(config), "parallelism.precision=fp32", f"run.output_dir={tmp_path / 'fp32'}")
    ranks2.run(run_training, str(config), "parallelism.precision=fp16", f"parallelism.deepspeed={ds_config}")
    norms = [[step["grad_norm"] for step in lines(tmp_path / name / "metrics.jsonl")] for name in ("run", "fp32")]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    scaled, unscaled = (states(tmp_path / name / "checkpoints" / "step_00000006") for name in ("run", "fp32"))
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step_00000006")
    assert max(manifest.training["loss_scaler"][name] for name in ("cur_scale", "grown")) > 2**4
    for key, value in unscaled.items():
        # At initialization only lora_B has gradients large enough to compare: B = 0, so A gets none.
        if key.startswith("exp_avg/") and "lora_B" in key:
            assert (scaled[key] - value).norm() < 0.05 * value.norm(), key
