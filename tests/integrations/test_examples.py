"""The examples of docs/integrations.md, as a user runs them, on a tiny backbone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldmole_dist.model.backbone import load_adapter, load_backbone
from tests.small_run import make_folder

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.parametrize("name", ["hf_trainer", "sft_trainer", "dpo_trainer", "grpo_trainer", "accelerate_loop"])
def test_example(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path)
    (line,) = re.findall(rf"^\.venv/bin/(.* examples/{name}\.py) ", (ROOT / "docs/integrations.md").read_text(), re.M)
    launcher, *rest = line.split()
    start = ["-m", "accelerate.commands.launch", *rest[1:]] if launcher == "accelerate" else rest
    arguments = [str(tmp_path / "backbone"), str(tmp_path / "train.jsonl"), str(tmp_path / "out"), "--steps", "2"]
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
    backbone = load_backbone(str(tmp_path / "backbone"), "causal_lm", "fp32")
    adapter = load_adapter(backbone, str(tmp_path / "out"), trainable=True)
    trained = {n: p for n, p in adapter.named_parameters() if "lora_B" in n}
    assert trained and all(bool(p.abs().sum() > 0) for p in trained.values())
