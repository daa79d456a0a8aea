"""A gradient that is no number stops every rank at every ZeRO stage, although the loss was finite."""

from pathlib import Path

import pytest
import torch

from ldmole_dist.errors import NonFiniteLoss
from ldmole_dist.method.layer import InputGroup
from ldmole_dist.ranks import LocalRanks
from tests.small_run import make_backbone, make_config, make_data, run_training


def train_with_broken_gradients(path: str, *overrides: str) -> str:
    """One NaN in the gradient of one linear's adapter on rank 1; returns what the run raised."""
    original = InputGroup.delta

    def delta(self: InputGroup, member: object, x: torch.Tensor) -> torch.Tensor:
        y = original(self, member, x)  # type: ignore[arg-type]
        if y.requires_grad and torch.distributed.get_rank() == 1:
            y.register_hook(lambda grad: grad.masked_fill(torch.ones_like(grad, dtype=torch.bool), torch.nan))
        return y

    InputGroup.delta = delta  # type: ignore[method-assign]
    try:
        run_training(path, *overrides)
    except NonFiniteLoss as error:
        return str(error)
    finally:
        InputGroup.delta = original  # type: ignore[method-assign]
    return "it went on"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_no_number_stops_all_ranks(tmp_path: Path, ranks2: LocalRanks, stage: int) -> None:
    make_backbone(tmp_path / "backbone")
    make_data(tmp_path / "train.jsonl", 20)
    config = make_config(tmp_path, data={"eval": None})
    for said in ranks2.run(train_with_broken_gradients, str(config), f"parallelism.deepspeed=zero{stage}"):
        assert "gradient norm is" in said and "at step 1" in said
