"""Router noise depends on the seed, decreases, and is repeated by recomputation and by a resumed run."""

import json
import shutil
from pathlib import Path

import pytest

from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import make_config, make_folder, run_training


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    optimisation = {"max_steps": 2, "router_noise": 1.0, "router_noise_share": 1.0}
    return make_config(make_folder(tmp_path_factory.mktemp("noise")), data={"eval": None}, optimisation=optimisation)


def losses(ranks: LocalRanks, config: Path, name: str, *overrides: str) -> list[float]:
    run = config.parent / name
    ranks.run(run_training, str(config), *overrides, f"run.output_dir={run}")
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_recomputation_repeats_the_noise(ranks2: LocalRanks, config: Path) -> None:
    recomputed = losses(ranks2, config, "recomputed")
    kept = losses(ranks2, config, "kept", "parallelism.gradient_checkpointing=false")
    assert recomputed == pytest.approx(kept, rel=1e-6)
    quiet = losses(ranks2, config, "quiet", "optimisation.router_noise=0")
    assert recomputed[0] != quiet[0]


@pytest.mark.full
def test_resumed_run_repeats_the_noise(ranks2: LocalRanks, config: Path) -> None:
    uninterrupted = losses(ranks2, config, "whole", "run.save_every=1")
    shutil.rmtree(config.parent / "whole" / "checkpoints" / "step_00000002")
    assert losses(ranks2, config, "whole", "run.save_every=1") == uninterrupted
