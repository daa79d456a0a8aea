"""DeepSpeed configs: loading, completion for a run, and refused keys and values."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ldmole_dist.engine.ds_config import SHIPPED, load_ds_config, resolve_ds_config, stage_of
from ldmole_dist.errors import UserError

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}


def resolve(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    run = dict(micro_batch_size=3, accumulation=2, max_grad_norm=0.5, precision="fp32", ep_size=1) | changes
    return resolve_ds_config(config, **run)


def contains_auto(value: Any) -> bool:
    if isinstance(value, dict):
        return any(contains_auto(v) for v in value.values())
    return value == "auto"


def offload(**zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **zero}}


def test_all_shipped_files_are_known() -> None:
    assert {path.stem for path in SHIPPED.glob("*.json")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_shipped_files_load_and_are_completed(name: str) -> None:
    read = load_ds_config(name)
    assert stage_of(read) == STAGES[name] and read == load_ds_config(str(SHIPPED / f"{name}.json"))
    untouched = copy.deepcopy(read)
    config = resolve(read)
    assert read == untouched
    assert not contains_auto(config)
    assert config["train_micro_batch_size_per_gpu"] == 3 and config["gradient_accumulation_steps"] == 2
    # At stage 0 the engine clips gradients itself.
    assert config["gradient_clipping"] == (0.0 if STAGES[name] == 0 else 0.5)
    assert config["zero_allow_untested_optimizer"] is True and config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_optimization"] == read["zero_optimization"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_comes_from_the_run_config(precision: str) -> None:
    config = load_ds_config("zero2") | {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale_window": 9},
    }
    resolved = resolve(config, precision=precision)
    # Trainable parameters are float32 in a bf16 run too, so DeepSpeed gets no bf16 section.
    assert "bf16" not in resolved
    assert resolved.get("fp16") == ({"enabled": True, "loss_scale_window": 9} if precision == "fp16" else None)


def test_values_equal_to_those_of_the_run_are_accepted() -> None:
    config = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0.5, "fp16": {"enabled": False}}
    assert resolve(config | {"zero_optimization": {"stage": 1}})["gradient_clipping"] == 0.5
    assert stage_of(resolve({})) == 0


@pytest.mark.parametrize(
    ("addition", "run", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, {}, "train_micro_batch_size_per_gpu=4, but the run config needs 3"),
        ({"gradient_accumulation_steps": 1}, {}, "gradient_accumulation_steps=1, but the run config needs 2"),
        ({"gradient_clipping": 1.0}, {}, "gradient_clipping=1.0, but the run config needs 0.5"),
        ({"bf16": {"enabled": True}}, {}, "enables bf16, but parallelism.precision=fp32; remove the section"),
        (
            {"fp16": {"enabled": True}},
            {"precision": "bf16"},
            "enables fp16, but parallelism.precision=bf16; remove the section",
        ),
        ({"optimizer": {"type": "Adam"}}, {}, "sets optimizer, which is not supported: the run config decides"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "sets scheduler, which is not supported: the run config decides"),
        ({"elasticity": {"enabled": True}}, {}, "sets elasticity, which is not supported: the run config decides"),
        (
            {"torch_autocast": {"enabled": True}},
            {},
            "sets torch_autocast, which is not supported: the run config decides",
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, {"ep_size": 2}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 0}}, {"precision": "fp16"}, "deepspeed=zero1"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, {}, "compute_grad_norm=false"),
        (offload(offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), {}, "device=nvme is not supported"),
        (offload(offload_optimizer={"device": "cpu", "ratio": 0.5}), {}, "ratio=0.5 is not supported"),
        (offload(mics_shard_size=2), {}, "mics_shard_size"),
        (
            {"fp16": {"loss_scale_windw": 5}},
            {"precision": "fp16"},
            "unknown key fp16.loss_scale_windw; did you mean loss_scale_window?",
        ),
        ({"fp16": {"loss_scale": -1}}, {"precision": "fp16"}, "fp16.loss_scale"),
        ({"fp16": {"auto_cast": True}}, {"precision": "fp16"}, "fp16.auto_cast"),
        ({"fp16": {"loss_scale": True}}, {"precision": "fp16"}, "fp16.loss_scale=True: input should be a valid number"),
        ({"zero_optimisation": {"stage": 1}}, {}, "unknown key zero_optimisation; did you mean zero_optimization?"),
        (
            offload(reduce_bucket_sise=1),
            {},
            "unknown key zero_optimization.reduce_bucket_sise; did you mean reduce_buck",
        ),
        (offload(offload_param={"devise": "cpu"}), {}, "offload_param.devise; did you mean device?"),
        (offload(reduce_bucket_size=0), {}, "zero_optimization.reduce_bucket_size=0: input should be greater than"),
        (offload(zenflow={}), {}, "zero_optimization.zenflow, which is not supported"),
        ({"activation_checkpointing": {}}, {}, "set parallelism.gradient_checkpointing"),
    ],
)
def test_refused_values_are_named(addition: dict[str, Any], run: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        resolve(load_ds_config("zero1") | addition, **run)
    assert message in str(raised.value)


def test_hpz_is_accepted_without_expert_parallelism() -> None:
    assert resolve({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), (json.dumps({"zero_optimization": {"stage": 4}}), "stage=4: input should be 0, 1, 2 or 3")],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        load_ds_config(str(path))
    assert "mine.json" in str(raised.value)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match="'zero9': No such file.*, zero2_offload"):
        load_ds_config("zero9")
