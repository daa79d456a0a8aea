"""The quickstart with its backbone in 4 bits reaches the accuracy of the quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from ldmole_dist.model.backbone import load_backbone
from ldmole_dist.model.quantization import weight_bytes
from ldmole_dist.planner.memory import memory
from ldmole_dist.planner.workload import Strategy, Workload
from tests.quantization import need
from tests.test_readme import BACKBONE, ROOT, shell


def accuracy_after(run: Path) -> float:
    return float(json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["accuracy"])


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_quickstart_in_4_bits_is_within_2_points(tmp_path: Path) -> None:
    need("bitsandbytes")
    for name, quantization in (("plain", "null"), ("nf4", "nf4")):
        command = f"bash launch/quickstart.sh backbone.quantization={quantization} run.output_dir='{tmp_path / name}'"
        shell(command, ROOT, timeout=3600)
    plain, quantized = (accuracy_after(tmp_path / name) for name in ("plain", "nf4"))
    print(f"accuracy {plain:.1%}, with the backbone in nf4 {quantized:.1%}")
    assert abs(quantized - plain) <= 0.02

    path = str(ROOT / BACKBONE)
    taken = {q: weight_bytes(load_backbone(path, "causal_lm", "bf16", quantization=q)) for q in (None, "nf4", "int8")}
    print(f"bytes of the backbone: {taken}")
    config = AutoConfig.from_pretrained(path)
    for quantization, number in taken.items():
        workload = Workload(config, precision="bf16", quantization=quantization)
        assert memory(workload, Strategy(1, 2))["backbone"] == number
    assert taken["nf4"] < 0.5 * taken[None]
