"""LD-MoLE with TRL's GRPOTrainer: `python examples/grpo_trainer.py BACKBONE DATA.jsonl OUTPUT [--steps N]`."""

import argparse
from difflib import SequenceMatcher

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from ldmole_dist import AuxiliaryLosses, LdMoleConfig, LossWeights

parser = argparse.ArgumentParser()
parser.add_argument("backbone", help="folder or name of a causal language model")
parser.add_argument("data", help='JSON lines of {"prompt": ..., "completion": ...}')
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()


class LdMoleGRPOTrainer(AuxiliaryLosses, GRPOTrainer):
    """GRPOTrainer with the auxiliary losses."""


def similarity(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward completions that share characters with the answer, from 0 to 1."""
    return [SequenceMatcher(None, *pair).ratio() for pair in zip(completions, answer, strict=True)]


tokenizer = AutoTokenizer.from_pretrained(args.backbone)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
trainer = LdMoleGRPOTrainer(
    model=args.backbone,
    reward_funcs=similarity,
    args=GRPOConfig(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=8,
        gradient_checkpointing=True,
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train").rename_column("completion", "answer"),
    processing_class=tokenizer,
    peft_config=LdMoleConfig(num_experts=8, r=8, task_type="CAUSAL_LM"),
    auxiliary=LossWeights(balance=1.0),
)
trainer.train()
trainer.save_model()
