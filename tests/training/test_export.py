"""The adapter exported from 2 ranks with ep_size 2 is complete and computes the same logits in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ldmole_dist.checkpoint.export import export_adapter
from ldmole_dist.config import load_config
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.ds_config import load_ds_config, resolve_ds_config, stage_of
from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.generation.generate import Sampling, generate_batch, load_generator
from ldmole_dist.model.build import build_model
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import LABELS, make_backbone, make_config, make_data

IDS = torch.arange(2, 26).view(3, 8)


def train_and_export(path: str, overrides: list[str], out: str) -> Any:
    """Run two optimizer steps, export the adapter, and return the logits of the trained model; runs on a rank."""
    config, process = load_config(path, overrides), start()
    ds_config = resolve_ds_config(
        load_ds_config(config.parallelism.deepspeed),
        micro_batch_size=2,
        accumulation=1,
        max_grad_norm=1.0,
        precision=config.parallelism.precision,
        ep_size=2,
    )
    # Below the default threshold, parameters as small as these are not partitioned.
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = build_model(config, expert_parallel(2), process, stage_of(ds_config), 0)
    engine = Engine(model, ds_config, config.optimisation, total_steps=2)
    ids = IDS.roll(process.rank).to(process.device)
    for _ in range(2):
        logits = engine(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        engine.backward(logits.float().square().mean() + model.base_model.context.auxiliary_loss())
        engine.step()
    export_adapter(engine, Path(out), process)
    model.eval()
    ids = IDS.to(process.device)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().cpu()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_adapter_of_two_ranks_loads_in_one_process(tmp_path: Path, ranks2: LocalRanks, stage: int, task: str) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 8, task)
    config = make_config(tmp_path, backbone={"task": task}, optimisation={"learning_rate": 0.05})
    trained = ranks2.run(
        train_and_export, str(config), [f"parallelism.deepspeed=zero{stage}"], str(tmp_path / "adapter")
    )
    torch.testing.assert_close(trained[0], trained[1])  # not bitwise: ranks sum their experts in different orders

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    banks = {name: tensor for name, tensor in saved.items() if "lora_" in name}
    assert len(banks) == 2 * 2 * 7 and {len(tensor) for tensor in banks.values()} == {4}
    for name, tensor in banks.items():
        assert all(expert.abs().sum() > 0 for expert in tensor), f"{name}: an expert is zero"

    if task == "causal_lm":
        backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone", dtype=torch.float32)
    else:
        assert saved["base_model.model.score.weight"].abs().sum() > 0
        backbone = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "backbone", dtype=torch.float32, num_labels=len(LABELS), pad_token_id=0
        )
    model = PeftModel.from_pretrained(backbone, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert float((logits - trained[0]).norm() / logits.norm()) < 1e-5
    with torch.no_grad(), model.disable_adapter():
        untrained = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert float((untrained - logits).norm() / logits.norm()) > 1e-2

    if task == "causal_lm":
        generator, tokenizer = load_generator(find_saved_model(str(tmp_path / "adapter"), None), "fp32")
        (text,) = generate_batch(generator, tokenizer, ["The colour of rose is"], Sampling(max_new_tokens=5))
        assert text


def test_exported_adapter_initializes_training_under_another_topology(tmp_path: Path, ranks2: LocalRanks) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 8)
    config = make_config(tmp_path, optimisation={"learning_rate": 0.05})
    adapter = tmp_path / "adapter"
    first = ranks2.run(train_and_export, str(config), ["parallelism.deepspeed=zero3"], str(adapter))
    overrides = [f"adapter.init_from={adapter}", "optimisation.learning_rate=1e-30", "parallelism.deepspeed=zero1"]
    again = ranks2.run(train_and_export, str(config), overrides, str(tmp_path / "again"))
    assert float((again[0] - first[0]).norm() / first[0].norm()) < 1e-5
