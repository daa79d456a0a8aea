"""Routing on the hidden states of a forward without the adapter (router_input="hidden"), as in X-LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ldmole_dist.generation.generate import Sampling, generate_batch
from ldmole_dist.method.routers import Routing
from ldmole_dist.model.backbone import load_backbone, load_tokenizer, new_adapter
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.layer import LdMoleLinear
from ldmole_dist.tuner.model import tuner_of
from tests.small_adapter import adapt, backbone, config, logits, move
from tests.small_run import make_backbone, make_config, make_folder, run_training

IDS = torch.arange(3, 27).view(2, 12)


def hidden_adapter(**changes: Any) -> PeftModel:
    return move(adapt(router_input="hidden", **changes))


def test_all_linears_route_on_the_backbones_last_hidden_states() -> None:
    model = hidden_adapter().eval()
    seen: dict[str, torch.Tensor] = {}

    def observe(name: str, routing: Routing, _: Any) -> None:
        seen[name] = routing.logits_TE

    tuner_of(model).context.observer = observe
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
        hidden_TH = backbone().model(input_ids=IDS, use_cache=False).last_hidden_state.flatten(0, 1)  # type: ignore[operator]
    linears = {m.name: m for m in model.modules() if isinstance(m, LdMoleLinear)}
    assert seen.keys() == linears.keys() and len(seen) > 7
    for name, linear in linears.items():
        assert torch.allclose(seen[name], linear.ldmole_adapters["default"].router(hidden_TH), atol=1e-6), name
    assert not tuner_of(model).context.adapter_disabled


def test_routing_of_a_token_does_not_depend_on_later_tokens() -> None:
    model = hidden_adapter().eval()
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        start = model(input_ids=IDS[:, :7], use_cache=False).logits
    assert torch.allclose(whole[:, :7], start, atol=1e-5)


def test_save_and_load(tmp_path: Path) -> None:
    model = hidden_adapter()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(backbone(), str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(backbone()), atol=1e-6)


def test_cache_is_refused_and_generation_works_without(tmp_path: Path) -> None:
    model = hidden_adapter().eval()
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model(input_ids=IDS, use_cache=True)
    folder = str(make_backbone(tmp_path / "backbone"))
    small = move(new_adapter(load_backbone(folder, "causal_lm", "fp32"), config(router_input="hidden"))).eval()
    tokenizer, prompts = load_tokenizer(folder), ["grass", "The colour of sky and sea is"]
    together = generate_batch(small, tokenizer, prompts, Sampling(6))
    assert together == [generate_batch(small, tokenizer, [prompt], Sampling(6))[0] for prompt in prompts]


def test_linear_with_another_number_of_rows_is_refused() -> None:
    model = move(adapt(router_input="hidden", target_modules=["q_proj", "lm_head"]))
    with pytest.raises(
        ValueError, match="lm_head reads 2 rows, but router_input='hidden' gives its router 24 hidden states"
    ):
        model(input_ids=IDS, use_cache=False, logits_to_keep=1)


def test_unknown_router_input_is_refused() -> None:
    with pytest.raises(ValueError, match="router_input='x': input should be 'layer' or 'hidden'"):
        config(router_input="x")


@pytest.mark.parametrize(
    "case", ["zero2", *(pytest.param(stage, marks=pytest.mark.full) for stage in ("zero0", "zero1", "zero3"))]
)
def test_two_ranks_train_like_one(tmp_path: Path, ranks1: LocalRanks, ranks2: LocalRanks, case: str) -> None:
    """Two ranks with expert parallelism and recomputation against one process without."""
    make_folder(tmp_path)
    changes: dict[str, Any] = {"adapter": {"router_input": "hidden", "lora_dropout": 0.0}}
    path = str(make_config(tmp_path, optimisation={"max_steps": 3}, **changes))
    alone = [f"run.output_dir={tmp_path}/alone", "parallelism.ep_size=1", "parallelism.deepspeed=zero0"]
    ranks1.run(run_training, path, *alone, "parallelism.gradient_checkpointing=false")
    ranks2.run(run_training, path, f"run.output_dir={tmp_path}/spread", f"parallelism.deepspeed={case}")
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "spread")
    )
    assert two == pytest.approx(one, rel=1e-4)
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("alone", "spread")
    )
    for name, value in first.items():
        assert (second[name] - value).norm() <= 1e-2 * value.norm() + 1e-6, name
