"""Composed adapters: experts equal PEFT's LoRA and stay frozen in training under every ZeRO stage and dispatch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from ldmole_dist.checkpoint.export import export_checkpoint
from ldmole_dist.compose.build import compose
from ldmole_dist.errors import UserError
from ldmole_dist.model.backbone import load_adapter, load_backbone
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.layer import LdMoleLinear
from tests.small_run import make_config, make_folder, run_training

IDS = torch.arange(2, 26).view(3, 8)
LORAS: dict[str, dict[str, Any]] = {
    "first": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "second": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "third": {"r": 2, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}, "layers_to_transform": [1]},
    "fourth": {"r": 1, "target_modules": ["up_proj"], "lora_dropout": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("compose"))
    for seed, (name, settings) in enumerate(LORAS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(backbone(folder), LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_()
        model.save_pretrained(folder / name)
    compose(str(folder / "bank"), [str(folder / name) for name in LORAS], None, "softmax")
    return folder


def backbone(folder: Path) -> Any:
    return load_backbone(str(folder / "backbone"), "causal_lm", "fp32")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("number", range(len(LORAS)))
def test_single_active_expert_equals_its_lora(folder: Path, number: int) -> None:
    bank = load_adapter(backbone(folder), str(folder / "bank"), trainable=False)
    chosen = torch.zeros(len(LORAS))
    chosen[number] = 1.0
    for module in bank.modules():
        if isinstance(module, LdMoleLinear):
            module.ldmole_adapters["default"].router.forward = lambda x: 1e4 * chosen.expand(len(x), -1)  # scores
    expected = logits(PeftModel.from_pretrained(backbone(folder), folder / list(LORAS)[number]))
    assert (logits(bank) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(backbone(folder)) - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("router_input", ["layer", "hidden"])
def test_one_composed_lora_equals_it(folder: Path, tmp_path: Path, router_input: str) -> None:
    compose(str(tmp_path / "one"), [str(folder / "second")], None, "softmax", router_input=router_input)
    expected = logits(PeftModel.from_pretrained(backbone(folder), folder / "second"))
    found = logits(load_adapter(backbone(folder), str(tmp_path / "one"), trainable=False))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_only_routers_are_trainable(folder: Path) -> None:
    model = load_adapter(backbone(folder), str(folder / "bank"), trainable=True)
    for _ in range(2):  # PEFT sets requires_grad in several places
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained and all("router" in name for name in trained)
        model.set_adapter("default")
        with model.disable_adapter():
            pass


@pytest.mark.parametrize(
    "case",
    [
        "zero2 auto",
        *(
            pytest.param(case, marks=pytest.mark.full)
            for case in ("zero0 gather", "zero1 all_to_all", "zero3 auto", "zero3 all_to_all", "zero3 gather")
        ),
    ],
)
def test_training_keeps_the_experts(
    folder: Path, ranks1: LocalRanks, ranks2: LocalRanks, tmp_path: Path, case: str
) -> None:
    """Two ranks train the routers like one process and resume from a checkpoint; the saved experts are the initial ones."""
    stage, dispatch = case.split()
    config = str(
        make_config(
            folder,
            adapter={"init_from": str(folder / "bank")},
            optimisation={"max_steps": 4, "sparsity_coef": 0.0, "balance_coef": 1.0},
            run={"save_every": 2},
        )
    )
    alone = ["parallelism.ep_size=1", "parallelism.deepspeed=zero0", f"run.output_dir={tmp_path}/alone"]
    spread = [f"parallelism.deepspeed={stage}", f"parallelism.dispatch={dispatch}", f"run.output_dir={tmp_path}/spread"]
    ranks1.run(run_training, config, *alone)
    ranks2.run(run_training, config, *spread)
    ranks2.run(run_training, config, *spread, "optimisation.max_steps=5", "optimisation.schedule=constant")
    before = load_file(folder / "bank" / "adapter_model.safetensors")
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("alone", "spread"))
    assert [line["loss"] for line in two[:4]] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert len(two) == 5
    after = load_file(tmp_path / "spread" / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("router" not in name), name
    with pytest.raises(UserError, match="does not hold the experts, because its run did not train them"):
        export_checkpoint(tmp_path / "spread" / "checkpoints" / "step_00000004", tmp_path / "exported")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "uses DoRA, but only plain LoRA can be an expert"),
        ({"bias": "all"}, "uses bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"base_model_name_or_path": "elsewhere"}, "is for elsewhere, but the first adapter is for"),
        ({"r": 5}, "does not match"),
        ({"target_modules": ["q_proj"]}, "holds .*, which is not part of a linear that its config adapts"),
        ({"peft_type": "IA3"}, "cannot read an adapter|only LoRA adapters"),
    ],
)
def test_unsupported_adapter_is_rejected(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in (folder / "first").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        compose(str(tmp_path / "bank"), [str(folder / "second"), str(other)], None)
    assert not (tmp_path / "bank").exists()


def test_invalid_arguments_are_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already exists"):
        compose(str(folder / "bank"), [str(folder / "first")], None)
    with pytest.raises(UserError, match="cannot read an adapter"):
        compose(str(tmp_path / "bank"), [str(tmp_path)], None)
    with pytest.raises(UserError, match="only LoRA adapters"):
        compose(str(tmp_path / "bank"), [str(folder / "bank")], None)
    with pytest.raises(UserError, match="top_k=3 is greater than"):
        compose(str(tmp_path / "bank"), [str(folder / "first")], None, "topk", 3)
