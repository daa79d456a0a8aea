"""Train a tiny model and keep every file that the run writes, so that later versions can be tested against them.

Run it in a checkout of the commit whose files are to be kept:

    PYTHONPATH=. DS_ACCELERATOR=cpu python freeze.py FOLDER
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import ldmole_dist  # noqa: F401  (registers the method with PEFT)
from tests.small_run import make_backbone, make_config, make_data

TRAIN = Path("launch/train.py").resolve()
INPUT_IDS = torch.arange(260, 272).view(2, 6)


def freeze(folder: Path) -> None:
    """Write the backbone, the data, the config and the files of a run on two ranks.

    All paths inside the files are relative to `folder`, so that the folder can be moved.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    make_backbone(Path("backbone"), layers=1, hidden=16)
    make_data(Path("train.jsonl"), 40)
    make_data(Path("eval.jsonl"), 12)
    make_config(
        Path(),
        # Dropout draws differ between topologies; without it a run that resumes elsewhere must reach the same losses.
        adapter={"num_experts": 4, "r": 2, "lambda_hidden": 8, "lora_dropout": 0.0},
        optimisation={"max_steps": 4},
        run={"save_every": 2, "eval_every": 2, "detail_every": 2},
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, str(TRAIN), "config.yaml"], check=True)
    shutil.rmtree("run/tensorboard")

    backbone = AutoModelForCausalLM.from_pretrained("backbone", dtype=torch.float32)
    model = PeftModel.from_pretrained(backbone, "run/adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS)).logits
    save_file({"input_ids": INPUT_IDS, "logits": logits.contiguous()}, "logits.safetensors")


if __name__ == "__main__":
    freeze(Path(sys.argv[1]).resolve())
