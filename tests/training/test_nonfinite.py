"""A gradient that is no number stops every rank at every ZeRO stage, although the loss was finite."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmole_dist.checkpoint.load import newest
from ldmole_dist.checkpoint.manifest import verify
from ldmole_dist.checkpoint.save import Saver
from ldmole_dist.errors import NonFiniteLoss
from ldmole_dist.method.layer import InputGroup, MoELinear
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import make_backbone, make_config, make_data, run_training


def train_with_broken_gradients(path: str, *overrides: str, only_if: Sequence[bool] = (True,)) -> str:
    """NaN in the gradients of the adapters on rank 1, as soon as `only_if` holds something; returns what the run raised."""
    original = InputGroup.start

    def start(self: InputGroup, member: MoELinear, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish = original(self, member, x)

        def broken() -> torch.Tensor:
            y = finish()
            if y.requires_grad and torch.distributed.get_rank() == 1 and only_if:
                y.register_hook(lambda grad: grad.masked_fill(torch.ones_like(grad, dtype=torch.bool), torch.nan))
            return y

        return broken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputGroup, "start", start)
        try:
            run_training(path, *overrides)
        except NonFiniteLoss as error:
            return str(error)
    return "it went on"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_no_number_stops_all_ranks(tmp_path: Path, ranks2: LocalRanks, stage: int) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 20)
    config = make_config(tmp_path, data={"eval": None})
    for said in ranks2.run(train_with_broken_gradients, str(config), f"parallelism.deepspeed=zero{stage}"):
        assert "gradient norm is" in said and "at step 1" in said


@pytest.mark.parametrize("fp16", [{"initial_scale_power": 2, "hysteresis": 1}, {"loss_scale": 4}])
def test_also_in_fp16_once_no_smaller_loss_scale_is_left(
    tmp_path: Path, ranks2: LocalRanks, fp16: dict[str, int]
) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 20)
    config = make_config(tmp_path, data={"eval": None})
    ds_config = tmp_path / "zero.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": fp16}))
    overrides = [f"parallelism.deepspeed={ds_config}", "parallelism.precision=fp16"]
    at = 1 if "loss_scale" in fp16 else 3  # the scale is 4, 2, 1
    for said in ranks2.run(train_with_broken_gradients, str(config), *overrides):
        assert "gradient norm is" in said and f"at step {at} " in said


def save_then_break(path: str, *overrides: str) -> str:
    """The gradients break in the step after the first checkpoint was begun, while it is still being written."""
    armed: list[bool] = []
    save, write = Saver.save, Saver._write

    def save_and_arm(self: Saver, *args: Any) -> None:
        save(self, *args)
        armed.append(True)

    def write_slowly(self: Saver, *args: Any) -> None:
        time.sleep(1.5)
        write(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", save_and_arm)
        patch.setattr(Saver, "_write", write_slowly)
        patch.setattr(Saver, "before_update", lambda self: None)  # what is copied late here is not what is tested
        try:
            return train_with_broken_gradients(path, *overrides, only_if=armed)
        finally:
            assert armed


def test_a_checkpoint_under_way_is_finished_first(tmp_path: Path, ranks2: LocalRanks) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 20)
    config = make_config(tmp_path, data={"eval": None}, run={"save_every": 1})
    for said in ranks2.run(save_then_break, str(config)):
        assert "gradient norm is" in said and "at step 2 " in said
    (checkpoint,) = newest(tmp_path / "run")
    assert checkpoint.name == "step_00000001" and verify(checkpoint) == []
