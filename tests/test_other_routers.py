"""Adapters with routers other than Sparsegen: against PEFT's LoRA, in adapter files, and in complete runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from ldmole_dist.cli import main
from ldmole_dist.config.adapter import LINEARS
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.layer import LdMoleLinear
from tests.small_adapter import E, R, adapt, backbone, config, logits, move
from tests.small_run import make_config, make_folder, run_training


def test_lora_router_equals_peft_lora() -> None:
    ours = move(adapt(router="lora"))
    targets = list(LINEARS)
    theirs = get_peft_model(
        backbone(), LoraConfig(r=E * R, lora_alpha=E * config().lora_alpha, lora_dropout=0.0, target_modules=targets)
    )
    lora = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if isinstance(module, LdMoleLinear):
            A_ERD, B_EOR = module.ldmole_adapters["default"].lora_A.data, module.ldmole_adapters["default"].lora_B.data
            other = lora[name]
            other.lora_A["default"].weight.data = A_ERD.flatten(0, 1)
            other.lora_B["default"].weight.data = B_EOR.transpose(0, 1).flatten(1)
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), logits(backbone()), atol=1e-2)


@pytest.mark.parametrize("router", ["topk", "lora"])
def test_adapter_file_has_only_the_routers_parameters(tmp_path: Path, router: str) -> None:
    adapt(router=router).save_pretrained(tmp_path)
    kinds = {name.split("_proj.")[-1] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert kinds == {"lora_A", "lora_B"} | ({"router.weight"} if router == "topk" else set())


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=f"top_k={E + 1} is greater than num_experts={E}"):
        config(router="topk", top_k=E + 1)
    with pytest.raises(ValueError, match="top_p=1.5: input should be less than or equal to 1"):
        config(router="top_p", top_p=1.5)
    with pytest.raises(ValueError, match="router='best': input should be"):
        config(router="best")


@pytest.mark.full
def test_relu_run_reports_l1_and_no_lambda(tmp_path: Path, ranks1: LocalRanks) -> None:
    """The ReLU router has no lambda, and its L1 coefficient follows the number of active experts."""
    folder = make_folder(tmp_path)
    path = make_config(
        folder,
        adapter={"router": "relu"},
        optimisation={"l1_coef": 0.5, "l1_rate": 1.5, "sparsity_target": 2, "max_steps": 5},
        parallelism={"ep_size": 1},
        run={"detail_every": 1, "save_every": 2},
    )
    ranks1.run(run_training, str(path))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    auxiliary = {key for key in lines[0] if key.startswith("loss_")}
    assert auxiliary == {"loss_task", "loss_l1", "loss_z"}
    assert not any("lambda" in key for line in lines for key in line)
    for line, following in zip(lines, lines[1:], strict=False):
        grows = line["experts_per_token"] > 2
        assert following["l1_coef"] == pytest.approx(line["l1_coef"] * (1.5 if grows else 1 / 1.5))
        expected = line["loss_task"] + line["l1_coef"] * line["loss_l1"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert main(["report", str(folder / "run"), "--limit", "8", "--output", str(tmp_path / "report")]) == 0


@pytest.mark.full
def test_l1_coefficient_resumes_under_another_topology(tmp_path: Path, ranks1: LocalRanks, ranks2: LocalRanks) -> None:
    """The number of active experts is summed over all ranks, so the coefficient does not depend on their number."""
    path = make_config(
        make_folder(tmp_path),
        adapter={"router": "relu", "lora_dropout": 0.0},
        data={"eval": None},
        optimisation={"l1_coef": 0.01, "sparsity_target": 1},
        run={"save_every": 3, "keep_last": 9},
    )
    ranks2.run(run_training, str(path))

    def coefficients(run: Path) -> list[float]:
        return [json.loads(line)["l1_coef"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    whole = coefficients(tmp_path / "run")
    assert whole == pytest.approx(
        [0.01 * 1.2**step for step in range(6)]
    )  # more than the target is active, so it grows
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    overrides = [f"run.resume={checkpoint}", f"run.output_dir={tmp_path / 'alone'}", "parallelism.ep_size=1"]
    ranks1.run(run_training, str(path), *overrides, "parallelism.deepspeed=zero1")
    assert coefficients(tmp_path / "alone") == whole[3:]
