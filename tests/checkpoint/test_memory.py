"""Memory of saving, loading and exporting does not grow with the number of layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ldmole_dist.checkpoint.export import export_adapter
from ldmole_dist.checkpoint.manifest import read_manifest
from ldmole_dist.config import load_config
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.optimizer_state import create_moments
from ldmole_dist.planner.live import LiveBytes
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.training import run as training
from ldmole_dist.tuner.state_dict import is_expert_tensor
from tests.small_run import make_backbone, make_config, make_data

LAYERS = 6


def save_and_load(config: str, overrides: list[str]) -> dict[str, int]:
    """Return the peak bytes that saving, exporting and loading add; runs on a rank."""
    trainer = training.prepare(load_config(config, [*overrides, "run.resume=never"]))
    trainer.run()
    extra = {}
    with LiveBytes() as live:
        trainer.saver.save(trainer.engine, 1)
        trainer.saver.finish()
    extra["save"] = live.peak
    with LiveBytes() as live:
        export_adapter(trainer.engine, trainer.saver.folder.parent / "exported", trainer.process)
    extra["export"] = live.peak
    load = training.load_checkpoint

    def measured(engine: Engine, *args: Any) -> int:
        create_moments(engine)  # as the first optimizer step does; not part of loading
        with LiveBytes() as live:
            step = load(engine, *args)
        extra["load"] = live.peak
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load_checkpoint", measured)
        training.prepare(load_config(config, overrides))
    return extra


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 3))])
def test_peak_memory_is_below_the_experts_of_two_layers(tmp_path: Path, ranks2: LocalRanks, stage: int) -> None:
    make_backbone(tmp_path / "backbone", layers=LAYERS)
    make_data(tmp_path / "train.jsonl", 20)
    config = make_config(
        tmp_path,
        adapter={"num_experts": 8, "r": 16},
        data={"eval": None},
        optimisation={"max_steps": 1, "global_batch_size": 4},
        run={"save_async": False},
        parallelism={"deepspeed": f"zero{stage}"},
    )
    of_ranks = ranks2.run(save_and_load, str(config), [])
    shapes = read_manifest(tmp_path / "run" / "checkpoints" / "step_00000001").shapes
    experts = sum(4 * math.prod(shape) for name, shape in shapes.items() if is_expert_tensor(name))
    for extra in of_ranks:
        assert set(extra) == {"save", "export", "load"}
        for what, peak in extra.items():
            assert peak <= 2 * experts / LAYERS, what
