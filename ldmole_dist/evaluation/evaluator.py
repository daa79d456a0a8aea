"""Loss and accuracy on held-out rows, under every ZeRO stage and expert-parallel size.

Every rank runs the same number of forwards: a rank whose share is shorter repeats a row and does not count it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from ldmole_dist.cluster.heartbeat import heartbeat
from ldmole_dist.data.batches import collate
from ldmole_dist.data.encode import Encoded
from ldmole_dist.distributed import Process
from ldmole_dist.evaluation.metrics import Outcomes, training_metrics
from ldmole_dist.loss import IGNORED, answer_losses
from ldmole_dist.model.forward import batch_logits


class Evaluator:
    """Evaluates a model on a fixed set.

    Args:
        examples: all N of them, on every rank.
        pad_id: for batches.
        batch_size: sequences of one forward.
        process: of this rank.
    """

    def __init__(self, examples: Sequence[Encoded], pad_id: int, batch_size: int, process: Process) -> None:
        self.pad_id, self.batch_size, self.process = pad_id, batch_size, process
        self.examples = examples
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
        share = -(-len(examples) // process.world_size)
        mine = order[process.rank :: process.world_size]
        self.counted = len(mine)
        self.mine = (mine + order[:1] * share)[:share]

    def __call__(self, model: nn.Module, doing: str) -> dict[str, float]:
        """Run it; every rank calls it.

        Args:
            model: the PEFT model, inside or outside an engine; its training mode is restored.
            doing: what the progress bar says.

        Returns:
            See `training_metrics`.
        """
        return training_metrics(self.outcomes(model, doing), [example.domain for example in self.examples])

    @torch.no_grad()
    def outcomes(self, model: nn.Module, doing: str) -> Outcomes:
        """Of every example, in their order, on every rank; every rank calls it, and arguments are as above."""
        was_training = model.training
        model.eval()
        rows_N5 = torch.zeros(len(self.examples), 5, dtype=torch.float64, device=self.process.device)
        starts = range(0, len(self.mine), self.batch_size)
        for start in tqdm(starts, desc=doing, disable=not self.process.is_main, unit="batch"):
            heartbeat(doing)
            indices = self.mine[start : start + self.batch_size]
            rows_B5 = self._batch(model, [self.examples[i] for i in indices])
            counted = max(0, min(len(indices), self.counted - start))
            rows_N5[indices[:counted]] = rows_B5[:counted]
        model.train(was_training)
        if dist.is_initialized():
            dist.all_reduce(rows_N5)  # a row is of one rank, and zero on all others
        return Outcomes(*rows_N5.cpu().unbind(1))

    def _batch(self, model: nn.Module, examples: Sequence[Encoded]) -> Tensor:
        """(B, 5), the fields of `Outcomes`. A choice is made by the first token of the answer."""
        targets, logits = batch_logits(model, collate(examples, self.pad_id, self.process.device))
        targets_BS = targets.unflatten(0, (len(targets), -1)) if targets.dim() == 1 else targets
        logits_BSV = logits.unflatten(0, (len(logits), -1)) if logits.dim() == 2 else logits
        answered_BS = targets_BS != IGNORED
        loss_B = answer_losses(logits_BSV, targets_BS).sum(1)
        likeliest_BS = logits_BSV.argmax(-1)
        greedy_B = ((likeliest_BS == targets_BS) | ~answered_BS).all(1)
        if targets.dim() == 1:
            chosen_B, target_B = likeliest_BS[:, 0], targets
        else:
            rows_B, first_B = torch.arange(len(examples), device=logits.device), answered_BS.int().argmax(1)
            choices_BC = _padded([e.choices or () for e in examples], logits.device)
            scores_BC = logits_BSV[rows_B, first_B].gather(1, choices_BC.clamp_min(0))
            chosen_B = scores_BC.masked_fill(choices_BC < 0, -torch.inf).argmax(1)
            target_B = (choices_BC == targets_BS[rows_B, first_B].unsqueeze(1)).int().argmax(1)
            choosing_B = (choices_BC[:, 0] >= 0) & answered_BS.any(1)
            chosen_B, target_B = chosen_B.where(choosing_B, -1), target_B.where(choosing_B, -1)
        return torch.stack([v.double() for v in (loss_B, answered_BS.sum(1), greedy_B, chosen_B, target_B)], dim=1)


def _padded(choices: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, C), -1 where a row has fewer; C at least 1."""
    width = max(1, *map(len, choices))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in choices], device=device)




