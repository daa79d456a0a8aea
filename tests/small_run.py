"""Files of a small training run: a tiny Llama with a trained tokenizer, data and a config."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ldmole_dist.config import load_config
from ldmole_dist.training.run import train

COLOURS = ["red", "green", "blue", "grey"]
LABELS = [f" {colour}" for colour in COLOURS]
THINGS = {"red": "rose blood cherry", "green": "leaf grass frog", "blue": "sky sea jay", "grey": "ash fog stone"}


def make_backbone(folder: Path, layers: int = 2, hidden: int = 32) -> Path:
    """Write a tiny Llama and a byte-level tokenizer in which each color is one token; return the folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = [f"The colour of {thing} is{label}." for label in LABELS for thing in THINGS[label.strip()].split()]
    tokenizer.train_from_iterator(text * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_data(path: Path, rows: int, task: str = "causal_lm") -> Path:
    """Write a JSON-lines file of rows about the colors of things; return its path."""
    chosen = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            colour = chosen.choice(COLOURS)
            things = " and ".join(chosen.choices(THINGS[colour].split(), k=chosen.randint(1, 4)))
            if task == "causal_lm":
                file.write(json.dumps({"prompt": f"The colour of {things} is", "completion": f" {colour}"}) + "\n")
            else:
                file.write(json.dumps({"text": f"The colour of {things}", "label": colour}) + "\n")
    return path


def make_folder(folder: Path) -> Path:
    """Write the backbone, training data and evaluation data that `make_config` refers to; return the folder."""
    make_backbone(folder / "backbone")
    make_data(folder / "train.jsonl", 30)  # less than the 6 steps of `make_config` read
    make_data(folder / "eval.jsonl", 12)
    return folder


def make_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a config for the files of `folder`, with `sections` replacing single values; return its path."""
    config: dict[str, Any] = {
        "backbone": {"path": str(folder / "backbone")},
        "adapter": {"num_experts": 4, "r": 2, "lambda_hidden": 16, "lora_dropout": 0.1},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "labels": LABELS,
            "max_length": 32,
        },
        "optimisation": {
            "max_steps": 6,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "learning_rate": 0.01,
            "sparsity_coef": 0.1,
        },
        "parallelism": {"precision": "fp32", "deepspeed": "zero2", "ep_size": 2, "timeout_minutes": 1},
        "run": {"output_dir": str(folder / "run")},
    }
    for section, values in sections.items():
        config[section] |= values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_training(path: str, *overrides: str) -> dict[str, float]:
    """Train from a config file; a function for `LocalRanks.run`."""
    return train(load_config(path, list(overrides)))
