"""LD-MoLE with Hugging Face's Trainer: `python examples/hf_trainer.py BACKBONE DATA.jsonl OUTPUT [--steps N]`."""

import argparse

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from ldmole_dist import LdMoleConfig, LdMoleTrainer, LossWeights

parser = argparse.ArgumentParser()
parser.add_argument("backbone", help="folder or name of a causal language model")
parser.add_argument("data", help='JSON lines of {"prompt": ..., "completion": ...}')
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.backbone)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encode(row: dict) -> dict:
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


data = load_dataset("json", data_files=args.data, split="train")
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(args.backbone), LdMoleConfig(num_experts=8, r=8, task_type="CAUSAL_LM")
)
trainer = LdMoleTrainer(
    model=model,
    args=TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=data.map(encode, remove_columns=data.column_names),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    auxiliary=LossWeights(balance=1.0),
)
trainer.train()
trainer.save_model()
