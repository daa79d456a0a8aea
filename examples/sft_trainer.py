"""LD-MoLE with TRL's SFTTrainer: `python examples/sft_trainer.py BACKBONE DATA.jsonl OUTPUT [--steps N]`."""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ldmole_dist import AuxiliaryLosses, LdMoleConfig, LossWeights

parser = argparse.ArgumentParser()
parser.add_argument("backbone", help="folder or name of a causal language model")
parser.add_argument("data", help='JSON lines of {"prompt": ..., "completion": ...}')
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()


class LdMoleSFTTrainer(AuxiliaryLosses, SFTTrainer):
    """SFTTrainer with the auxiliary losses."""


tokenizer = AutoTokenizer.from_pretrained(args.backbone)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
trainer = LdMoleSFTTrainer(
    model=args.backbone,
    args=SFTConfig(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    processing_class=tokenizer,
    peft_config=LdMoleConfig(num_experts=8, r=8, task_type="CAUSAL_LM"),
    auxiliary=LossWeights(balance=1.0),
)
trainer.train()
trainer.save_model()
