"""The training loop: optimizer steps of several micro-batches, what they report, and stopping when the loss is no number."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ldmole_dist.checkpoint.save import Saver
from ldmole_dist.config import Config
from ldmole_dist.data.batches import TrainingOrder, collate
from ldmole_dist.data.encode import Encoded
from ldmole_dist.diagnose import explain_nonfinite
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.startup import Process
from ldmole_dist.errors import NonFiniteLoss, Preempted
from ldmole_dist.evaluate import Evaluator, batch_logits
from ldmole_dist.monitor import Monitor
from ldmole_dist.objective import answer_count, answer_loss, next_tokens
from ldmole_dist.parallel.wire import KINDS
from ldmole_dist.peft_method import tuner_of
from ldmole_dist.pulse import pulse
from ldmole_dist.stop import StopRequest

# What ranks and micro-batches add up; "decisions" counts (token, linear) pairs.
SUMS = ("loss", "loss_task", "loss_balance", "loss_sparsity", "loss_z", "active", "lambda", "decisions", "tokens")


class Trainer:
    """Trains an engine's adapters.

    Args:
        config: of the run.
        engine: with the model.
        examples: of the training set, all of them on every rank.
        order: which of them when.
        evaluator: or None.
        pad_id: for batches.
        process: of this rank.
        saver: of checkpoints.
        first_step: optimizer steps already done.
        last_step: optimizer steps in all.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        examples: Sequence[Encoded],
        order: TrainingOrder,
        evaluator: Evaluator | None,
        pad_id: int,
        process: Process,
        saver: Saver,
        first_step: int,
        last_step: int,
    ) -> None:
        self.config, self.engine, self.process = config, engine, process
        self.examples, self.order, self.pad_id = examples, order, pad_id
        self.evaluator, self.first_step, self.last_step = evaluator, first_step, last_step
        self.saver, self.stop = saver, StopRequest()
        self.monitor = Monitor(Path(config.run.output_dir), process.is_main, first_step)
        self.context = tuner_of(engine.module).context

    def run(self) -> dict[str, float]:
        """Train to the last step.

        Returns:
            The evaluation after training; empty without an evaluator.

        Raises:
            NonFiniteLoss: on every rank, naming step, rank and layer.
            Preempted: on every rank, after a checkpoint, where one of them was asked to end.
        """
        with self.stop:
            try:
                return self._run()
            except NonFiniteLoss:
                self.saver.finish()  # what is being written is of before
                raise
            finally:
                self.monitor.close()

    def _run(self) -> dict[str, float]:
        run = self.config.run
        finished = self.first_step >= self.last_step
        result = self._evaluate(self.first_step) if self.first_step == 0 or finished else {}
        steps = tqdm(
            range(self.first_step + 1, self.last_step + 1),
            desc="training",
            initial=self.first_step,
            total=self.last_step,
            disable=not self.process.is_main,
            unit="step",
        )
        for step in steps:
            metrics = self._step(step)
            self.monitor.step(step, metrics)
            steps.set_postfix(loss=f"{metrics['loss']:.3f}", experts=f"{metrics['experts_per_token']:.2f}")
            if step == self.last_step or (run.eval_every and step % run.eval_every == 0):
                result = self._evaluate(step)
            asked, written = self._flags_of_all()
            if written:
                self.saver.finish()
            stopped = asked and step < self.last_step
            if stopped or (run.save_every and step % run.save_every == 0):
                self.saver.save(self.engine, step)
            if stopped:
                self.saver.finish()
                again = "start it again with run.resume=auto" if run.resume == "never" else "the same command goes on"
                raise Preempted(f"asked to end: saved after step {step} of {self.last_step}; {again}")
        self.saver.finish()
        return result

    def _flags_of_all(self) -> tuple[bool, bool]:
        """Whether some rank was asked to end, and whether all have written the checkpoint that is under way."""
        flags = torch.tensor([int(self.stop.requested), int(self.saver.done)], device=self.process.device)
        dist.all_reduce(flags)
        asked, written = flags.tolist()
        return asked > 0, written == self.process.world_size

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        result = self.evaluator(self.engine.module, f"evaluating after {step} steps")
        if not math.isfinite(result["eval_loss"]):
            batch = self._batches(max(step, 1))[0]
            raise NonFiniteLoss(
                f"the loss of the evaluation after {step} steps is {result['eval_loss']}; "
                f"{explain_nonfinite(self.engine, batch, False)}"
            )
        self.monitor.evaluation(step, result)
        if self.process.is_main:
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))
        return result

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step: its reported numbers, the same on every rank."""
        started = time.perf_counter()
        engine = self.engine
        engine.parallel.wire.clear()
        batches = self._batches(step)
        share = self._task_share(batches)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.process.device)
        losses = []
        for turn, batch in enumerate(batches):
            pulse(f"step {step}")
            targets, logits = batch_logits(engine, batch)
            task = answer_loss(logits, targets, self.config.optimisation.label_smoothing) * share.to(logits.device)
            loss = task + self.context.auxiliary_loss()
            engine.backward(loss)
            losses.append(loss.detach())
            sums += self._sums(loss.detach(), task.detach(), batch)
            if turn < len(batches) - 1:
                engine.step()
        metrics = self._reduced(sums, len(batches), detailed=step % self.config.run.detail_every == 0)
        if not math.isfinite(metrics["loss"]):
            bad = next((turn for turn, loss in enumerate(losses) if not loss.isfinite()), None)
            raise NonFiniteLoss(
                f"the loss is {metrics['loss']} at step {step}; {explain_nonfinite(engine, batches[bad or 0], bad is not None)}"
            )
        metrics["lr"] = engine.learning_rate
        self.saver.before_update()
        engine.step()
        metrics["grad_norm"] = engine.grad_norm
        if not math.isfinite(engine.grad_norm) and not engine.overflowed:
            raise NonFiniteLoss(
                f"the gradient norm is {engine.grad_norm} at step {step} although the loss was {metrics['loss']}: "
                "go on from the last checkpoint with a smaller learning rate; "
                f"{explain_nonfinite(engine, batches[0], False)}"
            )
        metrics["skipped_steps"] = engine.skipped_steps
        metrics["tokens_per_second"] = metrics.pop("tokens") / (time.perf_counter() - started)
        return metrics

    def _batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of an optimizer step (from 1)."""
        return [
            collate([self.examples[i] for i in micro_batch], self.pad_id, self.process.device)
            for micro_batch in self.order.micro_batches(step - 1, self.process.rank)
        ]

    def _task_share(self, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        """What a summed loss is multiplied with, so that the engine's mean over ranks and micro-batches becomes the mean
        over the answers of the whole optimizer step."""
        targets = [b["labels"] if b["labels"].dim() == 1 else next_tokens(b["labels"]) for b in batches]
        answers = torch.stack([answer_count(t) for t in targets]).sum()
        dist.all_reduce(answers)
        return self.process.world_size * len(batches) / answers.clamp_min(1).float()

    def _sums(self, loss: Tensor, task: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """This micro-batch's contributions, in the order of SUMS."""
        tokens = batch["attention_mask"].sum()
        stats = list(self.context.stats.values())
        active, lam = torch.stack(stats).sum(0)
        auxiliary = [torch.as_tensor(self.context.mean(term)).detach() for term in ("balance", "sparsity", "z")]
        values = [loss, task, *auxiliary, active, lam, tokens * len(stats), tokens]
        return torch.stack([v.to(device=loss.device, dtype=torch.float64) for v in values])

    def _reduced(self, sums: Tensor, micro_batches: int, detailed: bool) -> dict[str, Any]:
        """Global means and sums of an optimizer step; if detailed, also what each input group sent."""
        groups, table = self.engine.parallel.wire.table()
        everything = torch.cat([sums, table.flatten().to(sums)])
        dist.all_reduce(everything)
        everything = everything.cpu()
        total = dict(zip(SUMS, everything[: len(SUMS)].tolist(), strict=True))
        elements, sizes = everything[len(SUMS) :].long().view(table.shape)
        decisions = max(total.pop("decisions"), 1)
        means = {
            name: total[name] / (micro_batches * self.process.world_size) for name in SUMS if name.startswith("loss")
        }
        return means | {
            "experts_per_token": total["active"] / decisions,
            "lambda_mean": total["lambda"] / decisions,
            "wire_elements": int(elements.sum()),
            "wire_bytes": int(sizes.sum()),
            **({"wire": dict(zip(KINDS, elements.sum(0).tolist(), strict=True))} if groups else {}),
            **({"wire_by_group": _by_group(groups, elements)} if detailed and groups else {}),
            "tokens": total["tokens"],
        }


def _by_group(groups: list[str], elements_GK: Tensor) -> dict[str, dict[str, int]]:
    """Elements of each kind that each input group sent, where there were any."""
    return {
        group: {kind: number for kind, number in zip(KINDS, of_group, strict=True) if number}
        for group, of_group in zip(groups, elements_GK.tolist(), strict=True)
    }
