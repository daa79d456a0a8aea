"""A resumed run ends with bitwise the same result as an uninterrupted one, including dropout and the order of the data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import COLOURS, make_config, make_data, make_folder, run_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("resume"))


# Every stage, precision and ep_size; the nightly tests hold more of their combinations.
QUICK = [("zero2", 2, "fp16")]
FULL = [("zero0", 2, "fp32"), ("zero1", 1, "bf16"), ("zero3", 2, "fp32"), ("zero2_offload", 2, "fp32")]
NIGHTLY = [(f"zero{stage}", ep_size, "fp32") for stage in (0, 1, 2, 3) for ep_size in (1, 2)]
NIGHTLY += [(f"zero{stage}", 2, precision) for stage in (2, 3) for precision in ("fp16", "bf16")]
NIGHTLY += [("zero3_offload", 2, "fp32")]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)]
CASES += [pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY if case not in QUICK + FULL]


@pytest.mark.parametrize(("ds_config", "ep_size", "precision"), CASES)
def test_resume_is_bitwise_exact(
    folder: Path, ranks2: LocalRanks, ds_config: str, ep_size: int, precision: str
) -> None:
    check_resume(folder, ranks2, ds_config, ep_size, precision)


@pytest.mark.full
@pytest.mark.parametrize("ds_config", ["zero3", *(pytest.param(f"zero{n}", marks=pytest.mark.nightly) for n in (0, 2))])
def test_resume_with_a_trained_head(tmp_path: Path, ranks2: LocalRanks, ds_config: str) -> None:
    make_folder(tmp_path)
    make_data(tmp_path / "train.jsonl", 60, "sequence_classification")
    make_data(tmp_path / "eval.jsonl", 12, "sequence_classification")
    changes = {"backbone": {"task": "sequence_classification"}, "data": {"labels": COLOURS}}
    check_resume(tmp_path, ranks2, ds_config, 2, "fp32", **changes)


@pytest.mark.full
def test_resume_with_an_adaptive_coefficient(tmp_path: Path, ranks2: LocalRanks) -> None:
    changes = {"adapter": {"router": "relu"}, "optimisation": {"l1_coef": 0.5, "l1_rate": 2.0}}
    check_resume(make_folder(tmp_path), ranks2, "zero2", 2, "fp32", **changes)


def reported(run: Path) -> tuple[list[float], list[Any], list[Any]]:
    """Return losses, routing and evaluations of a run; NaN in the files, which JSON lacks, fails the test."""

    def lines(name: str) -> list[dict[str, Any]]:
        text = (run / name).read_text()
        return [json.loads(line, parse_constant=lambda value: pytest.fail(value)) for line in text.splitlines()]

    evaluations = [(line["step"], line["eval_loss"], line["accuracy"]) for line in lines("evaluations.jsonl")]
    return [line["loss"] for line in lines("metrics.jsonl")], lines("routing.jsonl"), evaluations


def check_resume(
    folder: Path, ranks2: LocalRanks, ds_config: str, ep_size: int, precision: str, **changes: dict[str, Any]
) -> None:
    config = make_config(folder, **changes)
    run = folder / f"run_{ds_config}_{ep_size}_{precision}"
    overrides = [
        f"run.output_dir={run}",
        f"parallelism.deepspeed={ds_config}",
        f"parallelism.ep_size={ep_size}",
        f"parallelism.precision={precision}",
        "optimisation.max_steps=4",
        "run.save_every=2",
        "run.detail_every=1",
        "run.eval_every=2",
    ]
    uninterrupted = ranks2.run(run_training, str(config), *overrides)
    expected = load_file(run / "adapter" / "adapter_model.safetensors")
    losses, routing, evaluations = reported(run)
    assert [len(losses), len(routing), len(evaluations)] == [4, 4, 3]

    # The state after a crash between the checkpoint and the end of the run.
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    shutil.rmtree(run / "adapter")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "lo')
    resumed = ranks2.run(run_training, str(config), *overrides)

    assert resumed == uninterrupted
    assert reported(run) == (losses, routing, evaluations)
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert again[name].equal(tensor), name
