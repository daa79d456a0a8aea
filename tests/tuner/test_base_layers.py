"""Backbones whose linears are not plain `nn.Linear`: compared with PEFT's LoRA on the same linears."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ldmole_dist import LdMoleConfig, LossWeights, tuner_of
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.layer import LdMoleLinear
from tests.small_adapter import move
from tests.small_run import make_config, make_folder, run_training

LORA_RANK = 4


def gpt2() -> PreTrainedModel:
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes))


def falcon() -> PreTrainedModel:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.0, attention_dropout=0.0)
    return FalconForCausalLM(FalconConfig(vocab_size=64, alibi=False, **sizes))


BACKBONES = {"gpt2": (gpt2, Conv1D), "falcon": (falcon, nn.Linear)}  # with the class that their linears are of
DRAW = torch.Generator().manual_seed(5)
IDS = torch.randint(0, 64, (2, 9), generator=DRAW)


def backbone(kind: str) -> Any:
    torch.manual_seed(3)
    return BACKBONES[kind][0]()


def adapted(kind: str, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(num_experts=4, r=2, lambda_hidden=8, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(backbone(kind), LdMoleConfig(task_type="CAUSAL_LM", **(settings | changes)))


def linears_of(model: Any) -> dict[str, LdMoleLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LdMoleLinear)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def gradients(model: Any, auxiliary: bool = False) -> dict[str, Tensor]:
    loss = model.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
    (loss + tuner_of(model).context.auxiliary_loss() if auxiliary else loss).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", BACKBONES)
def test_one_expert_without_router_equals_peft_lora(kind: str) -> None:
    ours = move(adapted(kind, router="lora", num_experts=1, r=LORA_RANK, lora_alpha=8.0))
    theirs: Any = get_peft_model(backbone(kind), LoraConfig(r=LORA_RANK, lora_alpha=8, target_modules="all-linear"))
    linears = linears_of(ours)
    assert len(linears) == 2 * 4 and all(isinstance(m.base_layer, BACKBONES[kind][1]) for m in linears.values())
    with torch.no_grad():
        for name, linear in linears.items():
            lora = theirs.get_submodule(name)
            lora.lora_A["default"].weight.copy_(linear.ldmole_adapters["default"].lora_A[0])
            lora.lora_B["default"].weight.copy_(linear.ldmole_adapters["default"].lora_B[0])
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5 < (logits(ours) - logits(backbone(kind))).abs().max()
    found, expected = gradients(ours), gradients(theirs)
    for name in linears:
        for part in ("lora_A", "lora_B"):
            gradient = expected[f"{name}.{part}.default.weight"]
            assert (found[f"{name}.ldmole_adapters.default.{part}"][0] - gradient).norm() < 1e-4 * gradient.norm(), (
                name,
                part,
            )


@pytest.mark.parametrize("kind", BACKBONES)
def test_adapter_starts_trains_and_is_saved(kind: str, tmp_path: Path) -> None:
    plain = logits(backbone(kind))
    model = adapted(kind)
    assert logits(model).equal(plain)
    move(model)
    tuner_of(model).context.weights = LossWeights(balance=0.5, z=0.1)
    moved = logits(model)
    assert (moved - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert logits(model).equal(plain)
    found = gradients(model, auxiliary=True)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in found.values())
    model.gradient_checkpointing_enable()
    again = gradients(model, auxiliary=True)
    assert all((again[name] - value).norm() < 1e-5 * value.norm() for name, value in found.items())
    model.save_pretrained(tmp_path)
    assert logits(PeftModel.from_pretrained(backbone(kind), str(tmp_path))).equal(moved)


@pytest.mark.full
def test_gpt2_trains_on_two_ranks_like_one(tmp_path: Path, ranks1: LocalRanks, ranks2: LocalRanks) -> None:
    make_folder(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "backbone"))
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shutil.rmtree(tmp_path / "backbone")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    adapter = {"lora_dropout": 0.0, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    config = make_config(
        tmp_path,
        adapter=adapter,
        optimisation={"eps": 1e-4, "learning_rate": 1e-3, "max_steps": 2},
        data={"eval": None},
    )
    zero3 = tmp_path / "zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    ranks1.run(run_training, str(config), "parallelism.ep_size=1", f"run.output_dir={tmp_path}/one")
    ranks2.run(run_training, str(config), f"parallelism.deepspeed={zero3}", f"run.output_dir={tmp_path}/two")
    one, two = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and max((two[name] - value).abs().max() for name, value in one.items()) < 1e-6
