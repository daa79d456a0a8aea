"""Packed sequences train with the same gradients as padded ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from ldmole_dist.config import load_config
from ldmole_dist.data.batches import pack, real_tokens
from ldmole_dist.data.encode import Encoded
from ldmole_dist.errors import UserError
from ldmole_dist.loss import IGNORED
from ldmole_dist.model.backbone import load_backbone
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.tuner.config import LdMoleConfig
from tests.integrations.test_trainers import move, our_gradients
from tests.small_run import make_config, make_folder


def test_pack_concatenates_sequences_and_restarts_positions() -> None:
    batch = pack([Encoded([5, 6, 7], [5, 6, 7]), Encoded([8], [8]), Encoded([9, 4], [IGNORED, 4])], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, IGNORED, 4]]
    assert real_tokens(batch) == 6


@pytest.mark.parametrize("text", [False, True])
def test_gradients_equal_those_of_padded_rows(tmp_path: Path, ranks1: LocalRanks, text: bool) -> None:
    """With all losses, and with routing replayed in the recomputation.

    Plain texts differ from answers in that their first token is not a target.
    """
    make_folder(tmp_path)
    adapter = LdMoleConfig(num_experts=4, r=2, lambda_hidden=16, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(load_backbone(str(tmp_path / "backbone"), "causal_lm", "fp32"), adapter)
    move(model).save_pretrained(tmp_path / "adapter")  # perturbed: at initialization some gradients are 0
    config = make_config(
        tmp_path,
        adapter={"init_from": str(tmp_path / "adapter")},
        optimisation={"micro_batch_size": 4, "balance_coef": 1.0, "z_coef": 0.1},
        parallelism={"ep_size": 1, "deepspeed": "zero0"},
        data={"eval": None},
    )
    overrides = ["run.resume=never"]
    if text:
        (tmp_path / "texts.jsonl").write_text(
            "".join('{"text": "%s"}\n' % ("a leaf and the sea " * (n % 2 + 1)) for n in range(20))
        )
        overrides += [f"data.train={tmp_path}/texts.jsonl", "data.labels=null"]
    ((padded, _),) = ranks1.run(our_gradients, str(config), *overrides)
    ((packed, _),) = ranks1.run(our_gradients, str(config), *overrides, "data.packing=true")
    assert padded.keys() == packed.keys() and any(gradient.norm() > 1e-3 for gradient in padded.values())
    for name, gradient in padded.items():
        assert (packed[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.task=sequence_classification"], "needs backbone.task=causal_lm"),
        (["backbone.attention=flex_attention"], "is not tested with backbone.attention=flex_attention"),
    ],
)
def test_unsupported_packing_is_rejected(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(str(make_config(tmp_path)), ["data.packing=true", *overrides])
