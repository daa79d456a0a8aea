"""Adapters, checkpoints, configs and reports that commit dd4ee09 wrote load with the current code (see README.md here)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ldmole_dist.cli import main
from ldmole_dist.config import load_config
from ldmole_dist.generation.generate import load_generator
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.report.history import last_step, read_routing_log
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import run_training

FROZEN = Path(__file__).parent / "dd4ee09"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the frozen files that a test may change."""
    return Path(shutil.copytree(FROZEN, tmp_path / "frozen"))


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("loader", ["PEFT", "ldmole"])
def test_adapter_computes_the_recorded_logits(loader: str) -> None:
    recorded = load_file(FROZEN / "logits.safetensors")
    if loader == "PEFT":
        backbone = AutoModelForCausalLM.from_pretrained(FROZEN / "backbone", dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(backbone, FROZEN / "run" / "adapter").eval()
    else:
        model, _ = load_generator(find_saved_model(str(FROZEN / "run"), str(FROZEN / "backbone")), "fp32")
    input_ids = recorded["input_ids"].to(model.device)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    torch.testing.assert_close(logits.cpu(), recorded["logits"])
    with torch.no_grad(), model.disable_adapter():
        without = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    assert float((without.cpu() - recorded["logits"]).abs().max()) > 1e-2  # else the adapter would not be tested


@pytest.mark.parametrize("step", [2, 4])
def test_checkpoint_passes_verify_and_inspect(step: int, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = FROZEN / "run" / "checkpoints" / f"step_{step:08d}"
    assert main(["checkpoint", "verify", str(checkpoint)]) == 0
    assert main(["checkpoint", "inspect", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert f"after {step} optimizer steps" in printed and "ZeRO 2, ep_size 2" in printed and "experts" in printed


def test_exported_checkpoint_equals_the_adapter(tmp_path: Path) -> None:
    checkpoint = FROZEN / "run" / "checkpoints" / "step_00000004"
    assert main(["checkpoint", "export", str(checkpoint), str(tmp_path / "exported")]) == 0
    exported, adapter = weights(tmp_path / "exported"), weights(FROZEN / "run" / "adapter")
    assert exported.keys() == adapter.keys()
    assert all(exported[name].equal(value) for name, value in adapter.items())
    config = [json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "exported", checkpoint)]
    assert config[0] == config[1]


def test_checkpoint_resumes_on_one_rank_under_zero_1(folder: Path, ranks1: LocalRanks) -> None:
    recorded = json_lines(folder / "run" / "metrics.jsonl")
    before = weights(folder / "run" / "adapter")
    overrides = [
        f"backbone.path={folder / 'backbone'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'eval.jsonl'}",
        f"run.output_dir={folder / 'run'}",
        f"run.resume={folder / 'run' / 'checkpoints' / 'step_00000002'}",
        "parallelism.deepspeed=zero1",
        "parallelism.ep_size=1",
    ]
    ranks1.run(run_training, str(folder / "config.yaml"), *overrides)
    metrics = json_lines(folder / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[:2] == recorded[:2]
    for key in ("loss", "loss_balance", "experts_per_token", "lambda_mean", "grad_norm", "lr"):
        assert [line[key] for line in metrics] == pytest.approx([line[key] for line in recorded], rel=1e-4), key
    assert [line["step"] for line in json_lines(folder / "run" / "evaluations.jsonl")] == [0, 2, 4]
    assert [line["step"] for line in json_lines(folder / "run" / "routing.jsonl")] == [2, 4]
    after = weights(folder / "run" / "adapter")
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_resolved_config_loads() -> None:
    config = load_config(str(FROZEN / "run" / "config.yaml"), [])
    assert config == load_config(str(FROZEN / "config.yaml"), [])
    assert config.adapter.lambda_hidden == 8 and config.optimisation.sparsity_coef == 0.1
    assert config.parallelism.deepspeed == "zero2" and config.run.save_every == 2


def test_report_reads_the_metrics() -> None:
    assert last_step(FROZEN / "run") == 4
    curves = read_routing_log(FROZEN / "run")
    assert [line["step"] for line in curves] == [2, 4] and all(len(line["linears"]) == 7 for line in curves)
