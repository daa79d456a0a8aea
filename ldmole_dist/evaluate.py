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
from ldmole_dist.method.context import Observer
from ldmole_dist.objective import IGNORED, answer_losses, answer_positions, next_tokens
from ldmole_dist.peft_method import LdMoleLinear, tuner_of
from ldmole_dist.pulse import pulse


class Evaluator:
    """Evaluates a model on a fixed set.

    Args:
        examples: all of them, on every rank.
        pad_id: for batches.
        batch_size: sequences of one forward.
        process: of this rank.
    """

    def __init__(self, examples: Sequence[Encoded], pad_id: int, batch_size: int, process: Process) -> None:
        self.pad_id, self.batch_size, self.process = pad_id, batch_size, process
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
            of_rows = self._batch(model, examples)[:counted]
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

    def _batch(self, model: nn.Module, examples: Sequence[Encoded]) -> Tensor:
        """(B, 4) of each row: loss, answers, whether it is right, and whether it can be right or wrong: a class can, and the
        first token of an answer among choices."""
        targets, logits = batch_logits(model, collate(examples, self.pad_id, self.process.device))
        targets_BS = targets.unflatten(0, (len(targets), -1)) if targets.dim() == 1 else targets
        logits_BSV = logits.unflatten(0, (len(logits), -1)) if logits.dim() == 2 else logits
        answered_BS = targets_BS != IGNORED
        loss_B = answer_losses(logits_BSV, targets_BS).sum(1)
        # The first answer of each row.
        rows_B, first_B = torch.arange(len(examples), device=logits.device), answered_BS.int().argmax(1)
        target_B, logits_BV = targets_BS[rows_B, first_B], logits_BSV[rows_B, first_B]
        if targets.dim() == 1:
            scored_B, right_B = answered_BS[:, 0], logits_BV.argmax(-1) == target_B
        else:
            choices_BC = _padded([e.choices or () for e in examples], logits.device)
            scores_BC = logits_BV.gather(1, choices_BC.clamp_min(0)).masked_fill(choices_BC < 0, -torch.inf)
            scored_B = (choices_BC[:, 0] >= 0) & answered_BS.any(1)
            right_B = choices_BC[rows_B, scores_BC.argmax(1)] == target_B
        values = (loss_B, answered_BS.sum(1), right_B & scored_B, scored_B)
        return torch.stack([v.double() for v in values], dim=1)


def _padded(choices: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, C), -1 where a row has fewer; C at least 1."""
    width = max(1, *map(len, choices))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in choices], device=device)


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
