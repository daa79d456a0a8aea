"""Reports of a run: all documented metrics exist, agree with each other, and do not depend on the number of ranks."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from ldmole_dist.checkpoint.load import list_checkpoints
from ldmole_dist.checkpoint.manifest import read_manifest
from ldmole_dist.engine.grad_norms import PARTS
from ldmole_dist.io import read_lines
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.checkpoint.test_damaged import train_with_file_size_limit
from tests.small_run import COLOURS, make_config, make_data, make_folder, run_training

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUMBERS = ["lambda_mean", "lambda_std", "experts_per_token", "entropy", "max_load", "dead_experts"]
EXPERTS, LAYERS = 4, 2


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_of(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a config with three evaluation rows, so that one of two ranks gets a padding row that must not count."""
    sections["data"] = {"eval_limit": 3} | sections.get("data", {})
    optimisation = {"max_steps": 4, "global_batch_size": 8} | sections.pop("optimisation", {})
    return make_config(
        folder,
        adapter={"lora_dropout": 0.0},
        optimisation=optimisation,
        run={"detail_every": 2, "eval_every": 2} | sections.pop("run", {}),
        **sections,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("monitor"))


@pytest.fixture(scope="module")
def run(folder: Path, ranks2: LocalRanks) -> Path:
    ranks2.run(run_training, str(config_of(folder)))
    return folder / "run"


def test_tensorboard_has_all_documented_tags(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    promised = {
        f"train/{name}" for name in ("loss", "loss_task", "loss_balance", "loss_sparsity", "loss_z", "grad_norm")
    }
    promised |= {f"train/{name}" for name in ("experts_per_token", "lambda_mean", "lambda_std", "dead_experts", "lr")}
    promised |= {f"train/{name}" for name in ("tokens_per_second", "peak_memory_gb", "wire_elements", "wire_bytes")}
    promised |= {f"eval/{name}" for name in ("eval_loss", "accuracy", "support_changed")}
    promised |= {f"grad_norm_by_part/{part}" for part in PARTS}
    promised |= {"dispatch_seconds/deciding", "dispatch_seconds/exchanging", "wire/rows", "wire/grad_sums"}
    for projection in PROJECTIONS:
        for number in [*NUMBERS, "support_changed"]:
            promised.add(f"routing/{number}/{projection}")
            promised |= {f"layers/{projection}/{number}/{layer:03}" for layer in range(LAYERS)}
    assert promised <= set(tags["scalars"])
    assert set(tags["histograms"]) == {f"experts_per_token/{projection}" for projection in PROJECTIONS}
    assert set(tags["images"]) == {f"load/{projection}" for projection in PROJECTIONS}
    assert [event.step for event in events.Scalars("layers/q_proj/entropy/001")] == [2, 4]
    (image, _) = events.Images("load/q_proj")
    assert (image.width, image.height) == (16 * EXPERTS, 16 * LAYERS)


def test_layout_matches_existing_tags(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = [(chart.title, pattern) for c in layout.category for chart in c.chart for pattern in chart.multiline.tag]
    assert len(charts) > 7 * len(PROJECTIONS)
    for title, pattern in charts:  # re.match, as TensorBoard does
        assert any(re.match(pattern, tag) for tag in events.Tags()["scalars"]), f"{title}: no tag matches {pattern}"


def test_routing_statistics_agree_with_step_metrics(run: Path) -> None:
    steps = {step["step"]: step for step in lines(run / "metrics.jsonl")}
    routing = lines(run / "routing.jsonl")
    assert [report["step"] for report in routing] == [2, 4]
    for report in routing:
        linears, metrics = report["linears"], steps[report["step"]]
        assert len(linears) == LAYERS * len(PROJECTIONS)
        for summary in linears.values():
            assert sum(summary["load"]) == pytest.approx(1, abs=1e-4)
            assert sum(summary["histogram"]) == pytest.approx(1, abs=1e-4)
            mean = sum(k * share for k, share in enumerate(summary["histogram"]))
            assert mean == pytest.approx(summary["experts_per_token"], abs=1e-3)
        for number, metric in (("experts_per_token", "experts_per_token"), ("lambda_mean", "lambda_mean")):
            mean = sum(summary[number] for summary in linears.values()) / len(linears)
            assert mean == pytest.approx(metrics[metric], rel=1e-4)
        assert metrics["dead_experts"] == sum(summary["dead_experts"] for summary in linears.values())
        assert metrics["peak_memory_gb"] > 0.1 and min(metrics["dispatch_seconds"].values()) > 0
    assert "dead_experts" not in steps[1]


def test_one_rank_reports_the_same_as_two(run: Path, folder: Path, ranks1: LocalRanks) -> None:
    overrides = ["parallelism.ep_size=1", f"run.output_dir={folder / 'alone'}"]
    ranks1.run(run_training, str(config_of(folder)), *overrides)
    for one, two in zip(lines(folder / "alone" / "routing.jsonl"), lines(run / "routing.jsonl"), strict=True):
        for name, summary in one["linears"].items():
            assert summary["tokens"] == two["linears"][name]["tokens"]
            for number in NUMBERS:
                assert summary[number] == pytest.approx(two["linears"][name][number], rel=0.02, abs=0.01), (
                    name,
                    number,
                )
    changed = [[e.get("support_changed") for e in lines(r / "evaluations.jsonl")] for r in (folder / "alone", run)]
    assert changed[0][0] is None and all(share > 0 for share in changed[0][1:])
    assert changed[0][1:] == pytest.approx(changed[1][1:], rel=0.02)


QUICK = [("zero0", 2, "fp32"), ("zero2", 2, "fp32")]
FULL = [("zero1", 1, "fp32"), ("zero3", 2, "fp32"), ("zero3_offload", 2, "fp32"), ("zero2", 2, "fp16")]
NIGHTLY = [(f"zero{stage}", ep_size, "fp32") for stage in range(4) for ep_size in (1, 2)]
NIGHTLY += [("zero2_offload", 2, "fp32"), ("zero3", 1, "fp16")]
GRADIENTS = [*QUICK, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)]
GRADIENTS += [pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY if case not in QUICK + FULL]


@pytest.mark.parametrize(("ds_config", "ep_size", "precision"), GRADIENTS)
def test_gradient_norms_by_part_add_up(
    folder: Path, ranks2: LocalRanks, ds_config: str, ep_size: int, precision: str
) -> None:
    out = folder / f"{ds_config}_{ep_size}_{precision}"
    overrides = [f"run.output_dir={out}", f"parallelism.deepspeed={ds_config}", f"parallelism.ep_size={ep_size}"]
    overrides += [f"parallelism.precision={precision}", "data.eval=null", "optimisation.max_grad_norm=0.01"]
    ranks2.run(run_training, str(config_of(folder)), *overrides, "optimisation.max_steps=2")
    metrics = lines(out / "metrics.jsonl")[1]
    parts = metrics["grad_norm_by_part"]
    assert math.sqrt(sum(part**2 for part in parts.values())) == pytest.approx(metrics["grad_norm"], rel=1e-4)
    assert parts["head"] == 0 and all(parts[part] > 0 for part in PARTS if part != "head")


def test_trained_head_has_its_gradient_norm(tmp_path: Path, ranks2: LocalRanks) -> None:
    make_folder(tmp_path)
    make_data(tmp_path / "train.jsonl", 60, "sequence_classification")
    make_data(tmp_path / "eval.jsonl", 12, "sequence_classification")
    config = config_of(tmp_path, backbone={"task": "sequence_classification"}, data={"labels": COLOURS})
    ranks2.run(run_training, str(config), "optimisation.max_steps=2")
    metrics = lines(tmp_path / "run" / "metrics.jsonl")[1]
    assert metrics["grad_norm_by_part"]["head"] > 0
    total = math.sqrt(sum(part**2 for part in metrics["grad_norm_by_part"].values()))
    assert total == pytest.approx(metrics["grad_norm"], rel=1e-4)


def test_probe_uses_the_training_set_without_an_evaluation_set(folder: Path, ranks2: LocalRanks) -> None:
    out = folder / "no_eval"
    ranks2.run(run_training, str(config_of(folder)), "data.eval=null", f"run.output_dir={out}")
    assert [set(line) for line in lines(out / "evaluations.jsonl")] == [{"step", "support_changed"}] * 2


def test_adapted_head_routes_answer_positions_only(tmp_path: Path, ranks2: LocalRanks) -> None:
    config = config_of(make_folder(tmp_path), optimisation={"max_steps": 2})
    ranks2.run(run_training, str(config), "adapter.target_modules=[q_proj, lm_head]", "parallelism.deepspeed=zero1")
    (routing,) = lines(tmp_path / "run" / "routing.jsonl")
    linears = routing["linears"]
    assert 8 <= linears["lm_head"]["tokens"] < linears["model.layers.0.self_attn.q_proj"]["tokens"]
    assert len(lines(tmp_path / "run" / "evaluations.jsonl")) == 2


def test_failed_report_stops_all_ranks_and_keeps_checkpoints(tmp_path: Path, ranks2: LocalRanks) -> None:
    config = config_of(make_folder(tmp_path), optimisation={"max_steps": 50}, run={"save_every": 2})
    errors = ranks2.run(train_with_file_size_limit, 110_000, str(config), "data.eval=null", "run.detail_every=1")
    assert errors[0].startswith("UserError: cannot write the reports of the run in ") and "File too large" in errors[0]
    assert errors[1].startswith("PeerError: rank 0 failed while writing the reports")
    reported = len(list(read_lines(tmp_path / "run" / "metrics.jsonl")))
    assert 2 < reported < 50
    # The latest checkpoint is from before the step whose report failed.
    assert read_manifest(list_checkpoints(tmp_path / "run")[0]).step == (reported - 1) // 2 * 2
    ranks2.run(run_training, str(config), f"optimisation.max_steps={reported + 2}", "run.resume=auto")
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, reported + 3))
