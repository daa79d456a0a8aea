"""Loss and accuracy on held-out rows, under every ZeRO stage and expert-parallel size.

Every rank runs the same number of forwards: a rank whose share is shorter repeats a row and does not count it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from ldmole_dist.data.batches import collate
from ldmole_dist.data.encode import Encoded
from ldmole_dist.engine.startup import Process
from ldmole_dist.errors import UserError
from ldmole_dist.method.context import Observer
from ldmole_dist.objective import IGNORED, answer_losses, answer_positions, next_tokens
from ldmole_dist.peft_method import LdMoleLinear, tuner_of
from ldmole_dist.pulse import pulse


class Evaluator:
    """Evaluates a model on a fixed set.

    Args:
        examples: all of them, on every rank.
        choices: token ids of the possible answers of a causal model, one token each, for accuracy; None if free text.
        pad_id: for batches.
        batch_size: sequences of one forward.
        process: of this rank.

    Raises:
        UserError: where an answer is longer than one token although choices are given.
    """

    def __init__(
        self, examples: Sequence[Encoded], choices: Sequence[int] | None, pad_id: int, batch_size: int, process: Process
    ) -> None:
        self.choices, self.pad_id, self.batch_size, self.process = choices, pad_id, batch_size, process
        self.domains = sorted({e.domain for e in examples if e.domain is not None})
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
        share = -(-len(examples) // process.world_size)
        mine = order[process.rank :: process.world_size]
        self.counted = len(mine)
        self.examples = [examples[i] for i in (mine + order[:1] * share)[:share]]

    @torch.no_grad()
    def __call__(self, model: nn.Module, doing: str) -> dict[str, float]:
        """Run it; every rank calls it.

        Args:
            model: the PEFT model, inside or outside an engine; its training mode is restored.
            doing: what the progress bar says.

        Returns:
            "eval_loss" (mean over answers), and "accuracy" (share of rows, 0 to 1) where there are choices or classes; the same
            as "code/eval_loss", "code/accuracy" of the rows of each domain, where rows have one.
        """
        was_training = model.training
        model.eval()
        # Of all rows, then of each domain: loss, answers, right, rows.
        sums = torch.zeros(1 + len(self.domains), 4, dtype=torch.float64, device=self.process.device)
        starts = range(0, len(self.examples), self.batch_size)
        for start in tqdm(starts, desc=doing, disable=not self.process.is_main, unit="batch"):
            pulse(doing)
            examples = self.examples[start : start + self.batch_size]
            counted = max(0, min(len(examples), self.counted - start))
            of_rows = self._batch(model, collate(examples, self.pad_id, self.process.device))[:counted]
            sums[0] += of_rows.sum(0)
            for index, domain in enumerate(self.domains, start=1):
                mine = torch.tensor([e.domain == domain for e in examples[:counted]], device=of_rows.device)
                sums[index] += of_rows[mine.bool()].sum(0)
        model.train(was_training)
        if dist.is_initialized():
            dist.all_reduce(sums)
        result = {}
        for prefix, of in zip(["", *(f"{domain}/" for domain in self.domains)], sums.tolist(), strict=True):
            loss, answers, right, rows = of
            result[f"{prefix}eval_loss"] = loss / max(answers, 1)
            if rows:
                result[f"{prefix}accuracy"] = right / rows
        return result

    def _batch(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(B, 4) of each row: loss, answers, right ones, and those that can be right or wrong."""
        targets, logits = batch_logits(model, batch)
        targets_BS = targets.unflatten(0, (len(targets), -1)) if targets.dim() == 1 else targets
        logits_BSV = logits.unflatten(0, (len(logits), -1)) if logits.dim() == 2 else logits
        answered_BS = targets_BS != IGNORED
        right_BS = rows_BS = torch.zeros_like(answered_BS)
        if targets.dim() == 1:
            right_BS, rows_BS = logits_BSV.argmax(-1) == targets_BS, answered_BS
        elif self.choices is not None:
            choices = torch.tensor(self.choices, device=logits.device)
            picked_BS = choices[logits_BSV[..., choices].argmax(-1)]
            right_BS, rows_BS = (picked_BS == targets_BS) & answered_BS, answered_BS
        loss_BS = answer_losses(logits_BSV, targets_BS)
        return torch.stack([v.double().sum(1) for v in (loss_BS, answered_BS, right_BS, rows_BS)], dim=1)


def batch_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Targets and the logits for them; a causal model computes no others (its head is the widest product of a small model).

    Args:
        model: callable as a Hugging Face model, an `Engine` included.
        batch: from `collate`.

    Returns:
        (B, S') and (B, S', V), or (B,) and (B, V) for classes.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if batch["labels"].dim() == 1:
        return batch["labels"], model(**inputs).logits
    targets = next_tokens(batch["labels"])
    positions = answer_positions(targets)
    return targets[:, positions], model(**inputs, logits_to_keep=positions).logits


@torch.no_grad()
def route(model: PeftModel, batch: Mapping[str, Tensor], observer: Observer | None) -> None:
    """One forward that shows the routing of every adapted linear to `observer`, and computes no more logits than it must.

    Args:
        model: in evaluation mode.
        batch: from `collate`.
        observer: see `StepContext`.
    """
    base: Any = model.get_base_model()
    inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"use_cache": False}
    # A causal model's head is the widest product of a small model: one position is enough, unless the head is adapted.
    if batch["labels"].dim() == 2 and not isinstance(base.get_output_embeddings(), LdMoleLinear):
        inputs["logits_to_keep"] = 1
    context = tuner_of(model).context
    context.observer = observer
    try:
        model(**inputs)
    finally:
        context.observer = None


def single_token_choices(labels: Sequence[str], ids: Sequence[Sequence[int]]) -> list[int]:
    """Token ids of labels that are one token each.

    Args:
        labels: for the message.
        ids: their token ids.

    Raises:
        UserError: naming the first that is longer, or two that are the same token.
    """
    for label, tokens in zip(labels, ids, strict=True):
        if len(tokens) != 1:
            raise UserError(
                f"data.labels: {label!r} is {len(tokens)} tokens for this tokenizer, accuracy needs labels of one token: "
                "write a leading space where words follow one, choose other words, or leave data.labels out"
            )
    choices = [tokens[0] for tokens in ids]
    if len(set(choices)) < len(choices):
        raise UserError(f"data.labels {list(labels)}: two of them are the same token for this tokenizer")
    return choices
