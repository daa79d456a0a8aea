"""A gradient that is no number stops every rank at every ZeRO stage, although the loss was finite."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldmole_dist.errors import NonFiniteLoss
from ldmole_dist.method.layer import InputGroup, MoELinear
from ldmole_dist.ranks import LocalRanks
from tests.small_run import make_backbone, make_config, make_data, run_training


def train_with_broken_gradients(path: str, *overrides: str) -> str:
    """One NaN in the gradient of one linear's adapter on rank 1; returns what the run raised."""
    original = InputGroup.start

    def start(self: InputGroup, member: MoELinear, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        finish = original(self, member, x)

        def broken() -> torch.Tensor:
            y = finish()
            if y.requires_grad and torch.distributed.get_rank() == 1:
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
