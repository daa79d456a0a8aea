"""The table of DeepSpeed keys agrees with the config models of the installed DeepSpeed."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from pydantic import TypeAdapter, ValidationError

from ldmole_dist.engine import ds_keys

SECTIONS = {
    "zero_optimization": (ds_keys.ZeroOptimization, DeepSpeedZeroConfig),
    "zero_optimization.offload_optimizer": (ds_keys.OffloadOptimizer, DeepSpeedZeroOffloadOptimizerConfig),
    "zero_optimization.offload_param": (ds_keys.OffloadParam, DeepSpeedZeroOffloadParamConfig),
    "bf16": (ds_keys.BF16, DeepSpeedBF16Config),
    "fp16": (ds_keys.FP16, DeepSpeedFP16Config),
}
REMOVED_BY_DEEPSPEED = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
# A former name of bf16, and a key that only inference reads; both are unknown keys here.
NOT_ACCEPTED = {"bfloat16", "vocabulary_size"}


class RecordingConfig(dict[str, Any]):
    """A config that records the keys that a parser asks for."""

    asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __copy__(self) -> RecordingConfig:
        return RecordingConfig(self)


def refused_below(section: str) -> set[str]:
    """Names of the refused keys directly below a section."""
    keys = (key.rpartition(".") for key in ds_keys.REFUSED)
    return {name for parent, _, name in keys if parent == section}


@pytest.mark.parametrize("section", SECTIONS)
def test_keys_of_a_section_equal_deepspeeds_model(section: str) -> None:
    ours, theirs = SECTIONS[section]
    known = {field.alias or name for name, field in theirs.model_fields.items()}
    accepted, refused = set(get_type_hints(ours)), refused_below(section)
    assert accepted | refused - REMOVED_BY_DEEPSPEED == known
    assert not accepted & refused


def test_top_level_keys_equal_those_that_deepspeed_reads() -> None:
    DeepSpeedConfig(RecordingConfig(train_micro_batch_size_per_gpu=1))
    accepted, refused = set(get_type_hints(ds_keys.DeepSpeedFile)), refused_below("")
    asked = RecordingConfig.asked
    assert accepted - asked == {"flops_profiler"}  # DeepSpeed looks for it in keys(), which is not recorded
    assert asked - accepted - refused == set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) - refused | NOT_ACCEPTED
    assert not accepted & refused


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, (ours, _) in SECTIONS.items() for key in get_type_hints(ours)]
)
def test_ranges_are_within_deepspeeds(section: str, key: str) -> None:
    ours, theirs = SECTIONS[section]
    adapter: TypeAdapter[Any] = TypeAdapter(ours)
    for value in (-1, 0, 0.5, 1, 2, 10**9, True, "cpu", "x", None, [], {}):
        try:
            adapter.validate_python({key: value})
        except ValidationError:
            continue
        stage = {"stage": 1} if section == "zero_optimization" else {}  # compute_grad_norm=False needs stage 1 or 2
        theirs(**stage | {key: value})  # raises if DeepSpeed would refuse what the table accepts
