"""Runs with a quantized backbone: equal to the run on the dequantized backbone, on every topology; evaluated and generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ldmole_dist.cli import main
from ldmole_dist.compose.build import compose
from ldmole_dist.errors import EXIT_EXPLAINED, UserError
from ldmole_dist.evaluation.model import eval_config, load_distributed, load_eval_data
from ldmole_dist.evaluation.rows import evaluate_rows
from ldmole_dist.generation.generate import Sampling, generate_batch, load_generator
from ldmole_dist.model.backbone import load_backbone, load_tokenizer
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.report.inputs import load_model
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.layer import LdMoleLinear
from tests.quantization import need
from tests.small_run import COLOURS, make_config, make_data, make_folder, run_training

PARTS = ("lora_", "router", "lambda_mlp", "random/")  # of the names in a checkpoint: the adapter and random states
SETTINGS: dict[str, Any] = dict(
    backbone={"quantization": "nf4"},
    adapter={"lora_dropout": 0.0},
    optimisation={"eps": 1e-4, "learning_rate": 1e-3, "max_steps": 2},
)


@pytest.fixture(scope="module", autouse=True)
def bitsandbytes() -> None:
    need("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks2: LocalRanks) -> Path:
    """A run with a backbone in nf4 on two ranks, at ZeRO 2 with ep_size 2."""
    folder = make_folder(tmp_path_factory.mktemp("quantized"))
    zero3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero3}))
    make_config(folder, **SETTINGS)
    ranks2.run(run_training, str(folder / "config.yaml"), "run.save_every=1")
    return folder


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def largest_difference(run: Path, other: Path) -> float:
    one, two = adapter_of(run), adapter_of(other)
    assert one.keys() == two.keys() and sum(float(value.abs().sum()) for value in one.values()) > 0
    return max(float((two[name] - value).abs().max()) for name, value in one.items())


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.full)])
def test_equals_a_run_on_the_dequantized_backbone(folder: Path, ranks1: LocalRanks, quantization: str) -> None:
    plain = folder / f"dequantized_{quantization}"
    loaded: Any = load_backbone(str(folder / "backbone"), "causal_lm", "fp32", quantization=quantization)
    loaded.dequantize().save_pretrained(plain)
    load_tokenizer(str(folder / "backbone")).save_pretrained(plain)

    def train(name: str, *changes: str) -> Path:
        run = folder / f"{name}_{quantization}"
        changes = ("parallelism.ep_size=1", f"run.output_dir={run}", *changes)
        ranks1.run(run_training, str(folder / "config.yaml"), *changes)
        return run

    quantized = folder / "run" if quantization == "nf4" else train("run", f"backbone.quantization={quantization}")
    on_dequantized = train("on_dequantized", "backbone.quantization=null", f"backbone.path={plain}")
    assert largest_difference(quantized, on_dequantized) < 1e-6
    assert largest_difference(quantized, train("on_backbone", "backbone.quantization=null")) > 1e-5


@pytest.mark.full
@pytest.mark.parametrize(
    ("ds_config", "ep_size"), [("zero0", 1), ("zero1", 2), ("zero2_offload", 2), ("zero3.json", 2), ("zero3.json", 1)]
)
def test_every_topology_gives_the_same_adapter(folder: Path, ranks2: LocalRanks, ds_config: str, ep_size: int) -> None:
    if ds_config.endswith(".json"):
        ds_config = str(folder / ds_config)
    run = folder / f"run_{Path(ds_config).stem}_{ep_size}"
    changes = [f"parallelism.deepspeed={ds_config}", f"parallelism.ep_size={ep_size}", f"run.output_dir={run}"]
    ranks2.run(run_training, str(folder / "config.yaml"), *changes)
    assert largest_difference(folder / "run", run) < 1e-6


def test_checkpoint_has_only_the_adapter_and_loads_on_another_topology(folder: Path, ranks1: LocalRanks) -> None:
    checkpoint = folder / "run" / "checkpoints" / "step_00000001"
    names = {name for file in checkpoint.glob("*.safetensors") for name in load_file(file)}
    others = {name for name in names if not any(part in name for part in PARTS)}
    assert len(names) > 3 * 2 * 7 and others == set()
    resumed = folder / "resumed"
    changes = ["parallelism.deepspeed=zero0", "parallelism.ep_size=1", f"run.output_dir={resumed}"]
    ranks1.run(run_training, str(folder / "config.yaml"), *changes, f"run.resume={checkpoint}")
    assert largest_difference(folder / "run", resumed) < 1e-6
    plain = [*changes[:2], f"run.output_dir={folder}/resumed_plain", "backbone.quantization=null"]
    ranks1.run(run_training, str(folder / "config.yaml"), *plain, f"run.resume={checkpoint}")
    assert 1e-6 < largest_difference(folder / "run", folder / "resumed_plain") < 1e-2


def evaluated(path: Path, *overrides: str) -> dict[str, Any]:
    """Evaluate a run or adapter; runs on a rank."""
    config = eval_config(find_saved_model(str(path), None), list(overrides), None, None, None)
    rows, encoder = load_eval_data(config)
    with load_distributed(config, with_adapter=True) as model:
        linear = next(m for m in model.engine.module.modules() if isinstance(m, LdMoleLinear))
        return evaluate_rows(model, encoder, rows, False)["all"] | {"linear": type(linear.base_layer).__name__}


def test_evaluation_and_generation_quantize_as_the_run_did(folder: Path, ranks1: LocalRanks) -> None:
    last = json.loads((folder / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    (found,) = ranks1.run(evaluated, folder / "run")
    assert found["linear"] == "Linear4bit" and found["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    (other,) = ranks1.run(evaluated, folder / "run", "backbone.quantization=null")
    assert other["linear"] == "Linear" and abs(other["loss"] - last["eval_loss"]) > 1e-4
    saved = find_saved_model(str(folder / "run"), None)
    generator, tokenizer = load_generator(saved, "fp32")
    reported = load_model(saved, "fp32", tokenizer)
    for model in (generator, reported):
        (linear, *_) = [m for m in model.modules() if isinstance(m, LdMoleLinear)]
        assert type(linear.base_layer).__name__ == "Linear4bit"
    (text,) = generate_batch(generator, tokenizer, ["The colour of rose is"], Sampling(max_new_tokens=5))
    assert text
    bare, _ = load_generator(saved, "fp32", with_adapter=False)
    assert sum(type(m).__name__ == "Linear4bit" for m in bare.modules()) == 2 * 7


@pytest.mark.full
@pytest.mark.parametrize(("quantization", "precision"), [("nf4", "bf16"), ("int8", "fp16")])
def test_classifier_trains_in_half_precision(
    tmp_path: Path, ranks2: LocalRanks, quantization: str, precision: str
) -> None:
    make_folder(tmp_path)
    make_data(tmp_path / "train.jsonl", 60, "sequence_classification")
    make_data(tmp_path / "eval.jsonl", 12, "sequence_classification")
    backbone = {"task": "sequence_classification", "quantization": quantization}
    changes = {"learning_rate": 0.01, "max_steps": 8}
    config = make_config(tmp_path, backbone=backbone, data={"labels": COLOURS}, optimisation=changes)
    result, _ = ranks2.run(run_training, str(config), f"parallelism.precision={precision}")
    first = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[0])
    assert result["eval_loss"] < first["eval_loss"] - 0.05


@pytest.mark.full
def test_composed_adapter_trains_on_a_quantized_backbone(folder: Path, ranks1: LocalRanks) -> None:
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        backbone: Any = load_backbone(str(folder / "backbone"), "causal_lm", "fp32")
        model = get_peft_model(backbone, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / name)
    compose(str(folder / "bank"), [str(folder / "first"), str(folder / "second")], None, "sparsegen")
    changes = [f"adapter.init_from={folder}/bank", "parallelism.ep_size=1", f"run.output_dir={folder}/composed"]
    ranks1.run(run_training, str(folder / "config.yaml"), *changes)
    before, after = load_file(folder / "bank" / "adapter_model.safetensors"), adapter_of(folder / "composed")
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert changed == {name for name in after if "lora_" not in name}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["backbone.quantization=int8", "parallelism.deepspeed=zero3"],
            "quantization=int8 does not work with ZeRO stage 3",
        ),
        (["backbone.quantization=nf4", "parallelism.deepspeed=zero3_offload"], "with zero_optimization.offload_param"),
        (["backbone.quantization=nf5"], "backbone.quantization"),
    ],
)
def test_unsupported_combination_is_an_error_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    config = str(make_config(tmp_path))
    assert main(["validate", config, *overrides]) == EXIT_EXPLAINED
    assert message in capsys.readouterr().err
    assert main(["validate", config, "--ranks", "2", *overrides]) == EXIT_EXPLAINED
    assert message in capsys.readouterr().err


def test_automatic_zero_stage_is_checked(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": "auto"}}')
    config = str(make_config(tmp_path))
    assert main(["validate", config, "backbone.quantization=int8", f"parallelism.deepspeed={tmp_path}/ds.json"]) == 0


def test_backbone_that_would_stay_in_16_bits_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path)
    config = str(make_config(tmp_path))
    assert main(["validate", config, "backbone.quantization=nf4", "--build"]) == 0
    sizes: dict[str, Any] = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    models = {
        "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=2, moe_intermediate_size=16)),
        "FalconLinear": FalconForCausalLM(FalconConfig(**sizes)),
    }
    for message, model in models.items():
        model.save_pretrained(tmp_path / message)
        build = ["validate", config, f"backbone.path={tmp_path / message}", "backbone.quantization=nf4", "--build"]
        capsys.readouterr()
        assert main(build) == EXIT_EXPLAINED
        error = capsys.readouterr().err
        assert "backbone.quantization=nf4 does not quantize" in error and message in error
        with pytest.raises(UserError, match=message):
            load_backbone(str(tmp_path / message), "causal_lm", "fp32", quantization="nf4")


def test_missing_bitsandbytes_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes; run: pip install 'ldmole-dist\[quantization\]'"):
        load_backbone(str(tmp_path / "backbone"), "causal_lm", "fp32", quantization="nf4")
