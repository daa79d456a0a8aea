"""The command `ldmole plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldmole_dist.cli import main
from ldmole_dist.config import load_config
from ldmole_dist.engine.ds_config import resolve_run
from ldmole_dist.errors import EXIT_EXPLAINED, UserError
from ldmole_dist.planner.candidates import Candidate, Machine, all_candidates
from ldmole_dist.planner.command import parse_memory
from ldmole_dist.planner.memory import PARTS
from ldmole_dist.planner.presets import load_backbone_config, preset_names
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.workload import Strategy, Workload
from ldmole_dist.planner.write import write_configs
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import make_folder, run_training

# Most tests share one workload, so that its traces are cached.
SMALL = ["--micro-batch", "2", "--answer-tokens", "64"]
BASE = ["plan", "--backbone", "Llama-3.2-1B", *SMALL, "--gpus", "8", "--gpu-memory", "80GB"]

# Parameters in the published files; those of Qwen's small models also contain their tied heads.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Qwen3-0.6B": 751_632_384 - 151_936 * 1024,
    "Qwen3-1.7B": 2_031_739_904 - 151_936 * 2048,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*BASE, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*BASE, *arguments]) == 0
    return capsys.readouterr().out


def test_presets_have_the_published_number_of_parameters() -> None:
    assert set(preset_names()) == set(PUBLISHED)
    for name, number in PUBLISHED.items():
        assert shapes_of(Workload(load_backbone_config(name))).frozen() == number, name


@pytest.mark.parametrize(
    ("gpus", "backbone", "micro_batch"),
    [
        ("8", "Llama-3.2-1B", "2"),
        pytest.param("8", "Llama-3.1-8B", "16", marks=pytest.mark.full),
        pytest.param("64", "Llama-3.1-70B", "4", marks=pytest.mark.full),
    ],
)
def test_written_config_is_the_recommended_one(
    gpus: str, backbone: str, micro_batch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*BASE, "--backbone", backbone, "--gpus", gpus, "--micro-batch", micro_batch]
    written = ["--write", str(tmp_path / "plan"), "--train", "train.jsonl", "--accumulation", "2"]
    assert main([*arguments, *written]) == 0
    printed = capsys.readouterr().out
    assert "recommended: ZeRO" in printed and "assumed rates: 150 TFLOP/s" in printed
    assert printed.startswith(f"{backbone} (preset): {PUBLISHED[backbone]:,} frozen parameters")
    for reason in ("memory:", "step:", "ep_size", "checkpointing", "stage", "offload"):
        assert any(line.startswith(f"  - {reason} ") for line in printed.splitlines()), reason
    assert "still to set in run.yaml: backbone.path, run.output_dir" in printed
    config = load_config(str(tmp_path / "plan" / "run.yaml"), [])
    resolved = resolve_run(config, int(gpus))
    assert resolved["train_micro_batch_size_per_gpu"] == int(micro_batch)
    assert resolved["gradient_accumulation_steps"] == 2
    assert config.data.train == "train.jsonl" and config.backbone.path == "FILL_IN"
    stage = resolved["zero_optimization"]["stage"]
    assert f"recommended: ZeRO {stage}, ep_size {config.parallelism.ep_size}," in printed
    assert json.loads((tmp_path / "plan" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == stage


def test_quantized_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = planned(capsys)
    quantized = planned(capsys, "--quantization", "nf4", "--write", str(tmp_path / "plan"))
    assert quantized["workload"]["quantization"] == "nf4" and plain["workload"]["quantization"] is None
    assert {line["strategy"]["stage"] for line in quantized["lines"]} == {0, 1, 2}
    bytes_of = [found["lines"][0]["bytes"]["backbone"] for found in (plain, quantized)]
    assert 0.3 * bytes_of[0] < bytes_of[1] < 0.5 * bytes_of[0]  # a fifth of the weights are embeddings, in bf16
    assert load_config(str(tmp_path / "plan" / "run.yaml"), []).backbone.quantization == "nf4"
    assert "step: bf16, linears in nf4" in printed(capsys, "--quantization", "nf4")


def test_json_lists_all_candidates_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys)
    lines = plan["lines"]
    assert len(lines) == 6 * 4 * 2  # shipped configs, ep_size 1 2 4 8, recomputation or not
    assert plan["preset"] and plan["backbone"] == "Llama-3.2-1B"
    assert plan["workload"]["rank"] == 8 and plan["workload"]["micro_batch"] == 2
    assert plan["recommended"]["strategy"] == lines[0]["strategy"] and plan["recommended"]["reasons"]
    fits = [line["fits"] for line in lines]
    assert fits == sorted(fits, reverse=True)
    for line in lines:
        assert set(line["bytes"]) == set(PARTS) and line["total_bytes"] == sum(line["bytes"].values())
        assert line["fits"] == (line["total_bytes"] <= plan["machine"]["usable"])
        assert line["host_bytes_of_node"] == 8 * line["host_bytes"]
        assert line["step_seconds"] == pytest.approx(sum(line["seconds"].values()))
    times = [line["step_seconds"] for line in lines if line["fits"]]
    assert times[0] <= 1.02 * min(times)


def test_recommendation_depends_on_rates_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    # With a very slow network, the candidate that sends the fewest bytes is recommended.
    plan = planned(capsys, "--bandwidth", "0.001")
    fewest = min(line["bytes_sent"] for line in plan["lines"] if line["fits"])
    assert plan["recommended"]["bytes_sent"] <= 1.05 * fewest
    assert plan["recommended"]["seconds"]["wire"] > plan["recommended"]["seconds"]["compute"]
    # With little memory, the faster candidates do not fit.
    wide, narrow = (planned(capsys, "--gpu-memory", size)["recommended"] for size in ("80GB", "8GB"))
    assert not wide["strategy"]["checkpointing"] and narrow["strategy"]["checkpointing"]
    assert wide["step_seconds"] < narrow["step_seconds"]


def test_all_lists_candidates_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    short, everything = (printed(capsys, "--gpu-memory", "8GB", *more) for more in ([], ["--all"]))
    rows, recommended = short.split("recommended")[0].splitlines(), everything.split("recommended")[0]
    assert any(" do not fit: " in row for row in rows) and not any(row.endswith("per GPU missing") for row in rows)
    assert "per GPU missing" in recommended and len(everything.splitlines()) > len(short.splitlines())


def test_reasons_agree_with_the_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for where in (["--gpus", "8"], ["--gpus", "1"], ["--gpus", "7", "--gpu-memory", "4GB"]):
        plan = planned(capsys, *where)
        best = plan["recommended"]
        fitting = [line["step_seconds"] for line in plan["lines"] if line["fits"]]
        if len(fitting) == 1:
            expected = "step: only candidate that fits"
        elif best["step_seconds"] == min(fitting):
            expected = f"step: shortest of {len(fitting)} candidates that fit"
        else:
            expected = "step: within 2% of the shortest"
        assert best["reasons"][1].startswith(expected)
        seen.add(expected[:10])
        # A single GPU and 7 GPUs allow no other expert-parallel size for 8 experts.
        assert any(reason.startswith("ep_size 1 -> ") for reason in best["reasons"]) == (where[1] == "8")
    assert len(seen) == 3


def test_offload_needs_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    # 7 GPUs allow no expert parallelism for 8 experts; in 4 GB only offloaded parameters fit.
    offload = ["--gpus", "7", "--gpu-memory", "4GB"]
    assert "  - host memory: 3.7 GB per node, not checked (--host-memory)\n" in printed(capsys, *offload)
    assert "  - host memory: 3.7 GB per node, of 1,000 GB\n" in printed(capsys, *offload, "--host-memory", "1TB")

    enough, short = ([*offload, "--host-memory", size] for size in ("3.7GB", "3.6GB"))
    assert planned(capsys, *enough)["recommended"]["host_bytes_of_node"] == pytest.approx(3.68e9, rel=0.01)
    assert main([*BASE, *short]) == EXIT_EXPLAINED
    out, error = capsys.readouterr()
    assert "0.08 GB of host memory per node missing" in out
    assert "No candidate fits into 3.6 GB per GPU and 3.6 GB of host memory per node." in error
    assert "optimizer+params offloaded: 0.08 GB of host memory per node missing" in error
    assert error.endswith("Use one of: --gpus 14.\n")  # over two nodes; a smaller batch does not reduce host memory
    assert planned(capsys, *short, "--gpus", "14")["recommended"]["fits"]
    # Candidates without offload need no host memory.
    assert planned(capsys, "--host-memory", "1MB")["recommended"]["strategy"]["offload"] == "none"


@pytest.mark.full  # the suggested settings are traced one by one
def test_suggested_settings_fit(capsys: pytest.CaptureFixture[str]) -> None:
    large = [*BASE, "--gpu-memory", "4.5GB", "--micro-batch", "8"]
    assert main(large) == EXIT_EXPLAINED
    out, error = capsys.readouterr()
    assert "recommended" not in out and " missing" in out
    assert error.startswith("error: No candidate fits into 4.0 GB per GPU. The closest is ") and error.count("\n") == 1
    assert "(largest parts of GPU memory: " in error
    option, number = error.partition("Use one of: ")[2].split()[:2]
    assert option == "--micro-batch"
    assert main([*large, option, number.strip(";.\n")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "Lama-8B"], "or one of SmolLM2-135M, Qwen3-0.6B, Llama-3.2-1B"),
        (["--gpu-memory", "80 apples"], "--gpu-memory '80 apples' is not a positive memory size; write it like 80GB"),
        (["--gpu-memory", "0GB"], "is not a positive memory size"),
        (["--host-memory", "much"], "--host-memory 'much' is not a positive memory size"),
        (["--active", "0.5"], "active=0.5 must be between 1 and num_experts=8"),
        (["--answer-tokens", "2000"], "answer_tokens=2000 must be between 1 and seq=1024"),
        (["--active", "9"], "active=9.0 must be between 1 and num_experts=8"),
        (["--active", "nan"], "active=nan must be between 1"),
        (["--tflops", "0"], "tflops=0.0 must be positive and finite"),
        (["--tflops", "nan"], "tflops=nan must be positive and finite"),
        (["--bandwidth", "inf"], "bandwidth=inf must be positive and finite"),
        (["--inter-bandwidth", "-1"], "bandwidth=-1.0 must be positive and finite"),
        (["--host-bandwidth", "nan"], "host_bandwidth=nan must be positive and finite"),
        (["--gpu-memory", "9" * 400], "is not a positive memory size"),
        (["--reserve", "1"], "reserved=1.0 must be in [0, 1); set --reserve to"),
        (["--target-modules", "query"], "query"),
        (["--write", "{folder}"], "run.yaml already exists"),
    ],
)
def test_invalid_arguments_are_explained(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").touch()
    assert main([*BASE, *(a.format(folder=tmp_path) for a in arguments)]) == EXIT_EXPLAINED
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_existing_files_are_never_replaced(tmp_path: Path) -> None:
    candidate = Candidate(Workload(load_backbone_config("Llama-3.2-1B")), Strategy(2, 1), Machine(2, 10**9))
    run, deepspeed = tmp_path / "run.yaml", tmp_path / "deepspeed.json"
    write_configs(candidate, tmp_path, None, None, None)
    texts = run.read_text(), deepspeed.read_text()
    for present, absent in ((run, deepspeed), (deepspeed, run)):
        before = absent.read_text()
        absent.unlink()
        with pytest.raises(UserError, match=f"{present.name} already exists"):
            write_configs(replace(candidate, strategy=Strategy(2, 2)), tmp_path, None, None, None)
        assert present.read_text() in texts and not absent.exists()
        absent.write_text(before)
    with pytest.raises(UserError, match="run.yaml is not a folder"):
        write_configs(candidate, run, None, None, None)  # the folder is a file
    with pytest.raises(UserError, match="cannot write the configs"):
        write_configs(candidate, run / "below", None, None, None)


def test_zero_gpus_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--backbone", "Llama-3.2-1B", "--gpus", "0", "--gpu-memory", "80GB"])
    assert stopped.value.code == 2 and "'0' is not a positive integer" in capsys.readouterr().err


def test_ep_size_divides_gpus_and_experts() -> None:
    workload = Workload(load_backbone_config("Llama-3.2-1B"), num_experts=6)
    assert {c.strategy.ep_size for c in all_candidates(workload, Machine(gpus=8, memory=10**9))} == {1, 2}


def test_memory_units() -> None:
    assert parse_memory("80GB") == 80 * 10**9
    assert parse_memory(" 79 GiB ") == 79 * 2**30
    assert parse_memory("1.5tb") == 15 * 10**11


@pytest.mark.full
def test_written_config_trains(ranks2: LocalRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path)
    arguments = ["--experts", "4", "--rank", "2", "--lambda-hidden", "16", "--seq", "32", "--micro-batch", "2"]
    where = ["--gpus", "2", "--gpu-memory", "2GB", "--precision", "fp32", "--write", str(tmp_path / "plan")]
    given = ["--train", str(tmp_path / "train.jsonl"), "--output-dir", str(tmp_path / "run")]
    assert main(["plan", "--backbone", str(tmp_path / "backbone"), *arguments, *where, *given]) == 0
    assert "still to set" not in capsys.readouterr().out
    steps = ["optimisation.epochs=null", "optimisation.max_steps=1"]
    ranks2.run(run_training, str(tmp_path / "plan" / "run.yaml"), *steps)
    (metrics,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert metrics["loss"] > 0
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
