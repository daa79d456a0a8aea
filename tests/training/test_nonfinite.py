"""A non-finite gradient stops every rank at every ZeRO stage, even if the loss is finite."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmole_dist.checkpoint.load import list_checkpoints
from ldmole_dist.checkpoint.manifest import verify
from ldmole_dist.checkpoint.save import Saver
from ldmole_dist.errors import NonFiniteLoss
from ldmole_dist.method.layer import InputGroup, MoELinear
from ldmole_dist.selftest.local_ranks import LocalRanks
from tests.small_run import make_backbone, make_config, make_data, run_training


def train_with_broken_gradients(path: str, *overrides: str, only_if: Sequence[bool] = (True,)) -> str:
    """Train with NaN in the adapter gradients of rank 1, and return the message of the error that the run raises.

    Args:
        path: of the config.
        overrides: of the config.
        only_if: gradients are broken while this is not empty.
    """
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
    return "no error was raised"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nonfinite_gradient_stops_all_ranks(tmp_path: Path, ranks2: LocalRanks, stage: int) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 20)
    config = make_config(tmp_path, data={"eval": None})
    for message in ranks2.run(train_with_broken_gradients, str(config), f"parallelism.deepspeed=zero{stage}"):
        assert "gradient norm is" in message and "at step 1" in message


@pytest.mark.parametrize("fp16", [{"initial_scale_power": 2, "hysteresis": 1}, {"loss_scale": 4}])
def test_nonfinite_gradient_stops_fp16_at_the_minimum_loss_scale(
    tmp_path: Path, ranks2: LocalRanks, fp16: dict[str, int]
) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 20)
    config = make_config(tmp_path, data={"eval": None})
    ds_config = tmp_path / "zero.json"
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": fp16}))
    overrides = [f"parallelism.deepspeed={ds_config}", "parallelism.precision=fp16"]
    at = 1 if "loss_scale" in fp16 else 3  # the dynamic scale falls from 4 to 2 to 1 first
    for message in ranks2.run(train_with_broken_gradients, str(config), *overrides):
        assert "gradient norm is" in message and f"at step {at} " in message


def save_then_break(path: str, *overrides: str) -> str:
    """Train with gradients that become NaN in the step after the first checkpoint starts, while it is still being written."""
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
        patch.setattr(Saver, "wait_for_copy", lambda self: None)  # do not wait for the slow write
        try:
            return train_with_broken_gradients(path, *overrides, only_if=armed)
        finally:
            assert armed


def test_pending_checkpoint_is_finished_before_the_error(tmp_path: Path, ranks2: LocalRanks) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 20)
    config = make_config(tmp_path, data={"eval": None}, run={"save_every": 1})
    for message in ranks2.run(save_then_break, str(config)):
        assert "gradient norm is" in message and "at step 2 " in message
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert checkpoint.name == "step_00000001" and verify(checkpoint) == []
