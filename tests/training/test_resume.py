"""A run that goes on from a checkpoint ends bit for bit where the uninterrupted one does, dropout and data order included."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ldmole_dist.ranks import LocalRanks
from tests.small_run import make_config, make_folder, run_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("resume"))


CASES = [(stage, ep_size, "fp32") for stage in (0, 1, 2, 3) for ep_size in (1, 2)]
CASES += [(stage, 2, precision) for stage in (2, 3) for precision in ("bf16", "fp16")]


@pytest.mark.parametrize(("stage", "ep_size", "precision"), CASES)
def test_resume_is_exact(folder: Path, ranks2: LocalRanks, stage: int, ep_size: int, precision: str) -> None:
    config = make_config(folder)
    run = folder / f"run_{stage}_{ep_size}_{precision}"
    overrides = [
        f"run.output_dir={run}",
        f"parallelism.deepspeed=zero{stage}",
        f"parallelism.ep_size={ep_size}",
        f"parallelism.precision={precision}",
        "run.save_every=3",
    ]
    uninterrupted = ranks2.run(run_training, str(config), *overrides)
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6

    # As after a crash between the checkpoint and the end.
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    shutil.rmtree(run / "adapter")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "lo')
    resumed = ranks2.run(run_training, str(config), *overrides)

    assert resumed == uninterrupted
    assert [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] == losses
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert again.keys() == whole.keys()
    for name, tensor in whole.items():
        assert again[name].equal(tensor), name
