"""LD-MoLE with TRL's DPOTrainer: `python examples/dpo_trainer.py BACKBONE DATA.jsonl OUTPUT [--steps N]`."""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from ldmole_dist import AuxiliaryLosses, LdMoleConfig, LossWeights

parser = argparse.ArgumentParser()
parser.add_argument("backbone", help="folder or name of a causal language model")
parser.add_argument("data", help='JSON lines of {"prompt": ..., "completion": ...}')
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()


class LdMoleDPOTrainer(AuxiliaryLosses, DPOTrainer):
    """DPOTrainer with the auxiliary losses."""


tokenizer = AutoTokenizer.from_pretrained(args.backbone)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

# Each prompt's own completion is preferred to a completion of another prompt.
data = load_dataset("json", data_files=args.data, split="train")
completions = sorted(set(data["completion"]))


def preference(row: dict, index: int) -> dict:
    others = [completion for completion in completions if completion != row["completion"]]
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": others[index % len(others)]}


trainer = LdMoleDPOTrainer(
    model=args.backbone,
    args=DPOConfig(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=data.map(preference, with_indices=True, remove_columns=data.column_names),
    processing_class=tokenizer,
    # The reference model is the backbone without this adapter.
    peft_config=LdMoleConfig(num_experts=8, r=8, task_type="CAUSAL_LM"),
    auxiliary=LossWeights(balance=1.0),
)
trainer.train()
trainer.save_model()
