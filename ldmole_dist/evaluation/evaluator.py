"""Loss and accuracy on held-out rows, with any ZeRO stage and expert-parallel size.

Every rank runs the same number of forward passes, because they contain collectives: a rank with one row fewer also runs the
shortest row and ignores its result.

Shapes: N examples, B sequences, S positions, C choices, V vocabulary size or number of classes.
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
    """Evaluation of a model on a fixed set of examples, distributed over all ranks.

    Args:
        examples: all N examples, on every rank.
        pad_id: token id of the padding.
        batch_size: sequences per forward pass of a rank.
        process: this rank.
    """

    def __init__(self, examples: Sequence[Encoded], pad_id: int, batch_size: int, process: Process) -> None:
        self.pad_id, self.batch_size, self.process = pad_id, batch_size, process
        self.examples = examples
        # Sort by length: batches of sequences with similar lengths need little padding.
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
        per_rank = -(-len(examples) // process.world_size)
        own = order[process.rank :: process.world_size]
        self.counted = len(own)
        self.indices = (own + order[:1] * per_rank)[:per_rank]

    def __call__(self, model: nn.Module, progress: str) -> dict[str, float]:
        """Evaluate a model. Collective: every rank must call it.

        Args:
            model: PEFT model, such as `Engine.module`; its training mode is restored.
            progress: label of the progress bar.

        Returns:
            The metrics of all examples (`training_metrics`), the same on every rank.
        """
        return training_metrics(self.outcomes(model, progress), [example.domain for example in self.examples])

    @torch.no_grad()
    def outcomes(self, model: nn.Module, progress: str) -> Outcomes:
        """Return the outcomes of all examples, in their order, on every rank.

        Collective: every rank must call it. The arguments are those of `__call__`.
        """
        was_training = model.training
        model.eval()
        outcomes_N5 = torch.zeros(len(self.examples), 5, dtype=torch.float64, device=self.process.device)
        starts = range(0, len(self.indices), self.batch_size)
        for start in tqdm(starts, desc=progress, disable=not self.process.is_main, unit="batch"):
            heartbeat(progress)
            indices = self.indices[start : start + self.batch_size]
            outcomes_B5 = self._evaluate_batch(model, [self.examples[i] for i in indices])
            counted = max(0, min(len(indices), self.counted - start))
            outcomes_N5[indices[:counted]] = outcomes_B5[:counted]
        model.train(was_training)
        if dist.is_initialized():
            dist.all_reduce(outcomes_N5)  # each row is nonzero on one rank only, so the sum gathers the rows
        return Outcomes(*outcomes_N5.cpu().unbind(1))

    def _evaluate_batch(self, model: nn.Module, examples: Sequence[Encoded]) -> Tensor:
        """Return the outcomes of B examples as a (B, 5) tensor, one column per field of `Outcomes`.

        The chosen answer is the choice with the highest logit at the position that predicts the first answer token; for
        sequence classification, it is the class with the highest logit.
        """
        targets, logits = batch_logits(model, collate(examples, self.pad_id, self.process.device))
        # Class labels are one target per sequence: add a position dimension of size 1.
        targets_BS = targets.unflatten(0, (len(targets), -1)) if targets.dim() == 1 else targets
        logits_BSV = logits.unflatten(0, (len(logits), -1)) if logits.dim() == 2 else logits
        is_answer_BS = targets_BS != IGNORED
        loss_B = answer_losses(logits_BSV, targets_BS).sum(1)
        predicted_BS = logits_BSV.argmax(-1)
        greedy_B = ((predicted_BS == targets_BS) | ~is_answer_BS).all(1)
        if targets.dim() == 1:
            chosen_B, target_B = predicted_BS[:, 0], targets
        else:
            rows_B, first_B = torch.arange(len(examples), device=logits.device), is_answer_BS.int().argmax(1)
            choices_BC = _pad_choices([e.choices or () for e in examples], logits.device)
            scores_BC = logits_BSV[rows_B, first_B].gather(1, choices_BC.clamp_min(0))
            chosen_B = scores_BC.masked_fill(choices_BC < 0, -torch.inf).argmax(1)
            target_B = (choices_BC == targets_BS[rows_B, first_B].unsqueeze(1)).int().argmax(1)
            has_choices_B = (choices_BC[:, 0] >= 0) & is_answer_BS.any(1)
            chosen_B, target_B = chosen_B.where(has_choices_B, -1), target_B.where(has_choices_B, -1)
        return torch.stack([v.double() for v in (loss_B, is_answer_BS.sum(1), greedy_B, chosen_B, target_B)], dim=1)


def _pad_choices(choices: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the token ids of the choices as a (B, C) tensor, padded with -1; C is at least 1."""
    width = max(1, *map(len, choices))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in choices], device=device)
