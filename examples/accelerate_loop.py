"""LD-MoLE in your own training loop: `accelerate launch examples/accelerate_loop.py BACKBONE DATA.jsonl OUTPUT [--steps N]`."""

import argparse
import itertools
import json

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from ldmole_dist import LdMoleConfig, LossWeights, tuner_of

parser = argparse.ArgumentParser()
parser.add_argument("backbone", help="folder or name of a causal language model")
parser.add_argument("data", help='JSON lines of {"prompt": ..., "completion": ...}')
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(args.backbone)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encode(row: dict) -> dict:
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


with open(args.data) as lines:
    examples = [encode(json.loads(line)) for line in lines]
loader = DataLoader(examples, batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(args.backbone), LdMoleConfig(num_experts=8, r=8, task_type="CAUSAL_LM")
)
context = tuner_of(model).context
context.weights = LossWeights(balance=1.0)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

model.train()
batches = itertools.chain.from_iterable(itertools.repeat(loader))
for index, batch in enumerate(itertools.islice(batches, args.steps * accelerator.gradient_accumulation_steps)):
    with accelerator.accumulate(model):
        # The auxiliary losses are those of the forward in the same expression.
        loss = model(**batch).loss + context.auxiliary_loss()
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            accelerator.print(f"step {(index + 1) // 2}: loss {loss.item():.3f}")
        optimizer.step()
        optimizer.zero_grad()
accelerator.unwrap_model(model).save_pretrained(args.output, is_main_process=accelerator.is_main_process)
accelerator.end_training()
