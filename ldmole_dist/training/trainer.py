"""The training loop: optimizer steps of several micro-batches, what they report, and stopping when the loss is no number."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ldmole_dist.checkpoint.save import Saver
from ldmole_dist.cluster.heartbeat import heartbeat
from ldmole_dist.config import Config
from ldmole_dist.data.batches import collate, pack
from ldmole_dist.data.training_data import TrainingData
from ldmole_dist.distributed import Process, raise_on_all_ranks
from ldmole_dist.engine.build import Engine
from ldmole_dist.errors import NonFiniteLoss, Preempted, UserError
from ldmole_dist.evaluation.evaluator import Evaluator
from ldmole_dist.loss import answer_count, answer_loss, next_tokens
from ldmole_dist.method.losses import adapted_l1
from ldmole_dist.method.noise import RouterNoise, linear_decay
from ldmole_dist.model.forward import batch_logits
from ldmole_dist.monitor.meter import Report, StepMeter
from ldmole_dist.monitor.probe import Probe
from ldmole_dist.monitor.writer import Monitor
from ldmole_dist.training.nonfinite import explain_nonfinite
from ldmole_dist.training.preemption import StopRequest
from ldmole_dist.tuner.model import tuner_of


class Trainer:
    """Trains an engine's adapters.

    Args:
        config: of the run.
        engine: with the model.
        data: what this rank trains on.
        evaluator: or None.
        probe: of how routing changes.
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
        data: TrainingData,
        evaluator: Evaluator | None,
        probe: Probe,
        pad_id: int,
        process: Process,
        saver: Saver,
        first_step: int,
        last_step: int,
    ) -> None:
        self.config, self.engine, self.process = config, engine, process
        self.data, self.pad_id = data, pad_id
        self.evaluator, self.probe = evaluator, probe
        self.first_step, self.last_step = first_step, last_step
        self.saver, self.stop = saver, StopRequest()
        with raise_on_all_ranks("opening the files that the run reports in"):
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
                result = self._run()
            except NonFiniteLoss:
                self.saver.finish()  # what is being written is of before
                raise
            finally:
                self.data.close()
                self.monitor.close()
            self._check_reports()
        return result

    def _run(self) -> dict[str, float]:
        run = self.config.run
        if self.first_step >= self.last_step:  # it has reported that already
            return self._evaluate(self.first_step)
        result = self._observe(0) if self.first_step == 0 and run.eval_before else {}
        steps = tqdm(
            range(self.first_step + 1, self.last_step + 1),
            desc="training",
            initial=self.first_step,
            total=self.last_step,
            disable=not self.process.is_main,
            unit="step",
        )
        for step in steps:
            report = self._step(step)
            self.monitor.step(step, report)
            loss, experts = report.metrics["loss"], report.metrics["experts_per_token"]
            steps.set_postfix(loss=f"{loss:.3f}", experts=f"{experts:.2f}")
            if step == self.last_step or (run.eval_every and step % run.eval_every == 0):
                result = self._observe(step)
            asked, written, unreported = self._flags_of_all()
            if written or unreported:
                self.saver.finish()
            if unreported:
                self._check_reports()
            stopped = asked and step < self.last_step
            if stopped or (run.save_every and step % run.save_every == 0):
                self.saver.save(self.engine, step)
            if stopped:
                self.saver.finish()
                again = "start it again with run.resume=auto" if run.resume == "never" else "the same command goes on"
                raise Preempted(f"asked to end: saved after step {step} of {self.last_step}; {again}")
        self.saver.finish()
        return result

    def _flags_of_all(self) -> tuple[bool, bool, bool]:
        """Whether some rank was asked to end, all have written the checkpoint that is under way, some could not report."""
        own = [self.stop.requested, self.saver.done, self.monitor.failed]
        flags = torch.tensor(own, dtype=torch.int64, device=self.process.device)
        dist.all_reduce(flags)
        asked, written, unreported = flags.tolist()
        return asked > 0, written == self.process.world_size, unreported > 0

    def _check_reports(self) -> None:
        """Every rank calls it. Raises UserError on the rank that could not write, PeerError on the others."""
        with raise_on_all_ranks("reporting"):
            self.monitor.check()

    def _observe(self, step: int) -> dict[str, float]:
        """Evaluate, see how routing has changed, and report both."""
        changed = self.probe.changed(self.engine)
        result = self._evaluate(step)
        if result or changed:
            self.monitor.evaluation(step, result, changed)
        return result

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        result = self.evaluator(self.engine.module, f"evaluating after {step} steps")
        if not math.isfinite(result["eval_loss"]):
            raise NonFiniteLoss(
                f"the loss of the evaluation after {step} steps is {result['eval_loss']}; "
                f"{explain_nonfinite(self.engine, self._batches(max(step, 1))[0], False)}"
            )
        if self.process.is_main:
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))
        return result

    def _step(self, step: int) -> Report:
        """One optimizer step: its report, the same on every rank."""
        started = time.perf_counter()
        engine = self.engine
        meter = StepMeter(engine, self.process, detailed=step % self.config.run.detail_every == 0)
        batches, share = self._agreed_batches(step)
        losses = []
        for turn, batch in enumerate(batches):
            heartbeat(f"step {step}")
            self.context.noise = self._noise(step, turn)
            targets, logits = batch_logits(engine, batch)
            task = answer_loss(logits, targets, self.config.optimisation.label_smoothing) * share.to(logits.device)
            loss = task + self.context.auxiliary_loss()
            engine.backward(loss)
            losses.append(loss.detach())
            meter.add(loss.detach(), task.detach(), batch)
            if turn < len(batches) - 1:
                engine.step()
        report = meter.report()
        metrics = report.metrics
        if not math.isfinite(metrics["loss"]):
            bad = next((turn for turn, loss in enumerate(losses) if not loss.isfinite()), None)
            self.context.noise = self._noise(step, bad or 0)
            raise NonFiniteLoss(
                f"the loss is {metrics['loss']} at step {step}; {explain_nonfinite(engine, batches[bad or 0], bad is not None)}"
            )
        metrics["lr"] = engine.learning_rate
        self.saver.before_update()
        engine.step()
        metrics["grad_norm"] = engine.grad_norm
        if not math.isfinite(engine.grad_norm) and not engine.overflowed:
            self.context.noise = self._noise(step, 0)
            raise NonFiniteLoss(
                f"the gradient norm is {engine.grad_norm} at step {step} although the loss was {metrics['loss']}: "
                "go on from the last checkpoint with a smaller learning rate; "
                f"{explain_nonfinite(engine, batches[0], False)}"
            )
        self.context.noise = None
        self._adapt_l1(metrics)
        metrics["skipped_steps"] = engine.skipped_steps
        metrics["tokens_per_second"] = metrics.pop("tokens") / (time.perf_counter() - started)
        return report

    def _adapt_l1(self, metrics: dict[str, Any]) -> None:
        """Report the coefficient that the L1 loss had in this step, and set that of the next: from what all ranks routed, so it
        is the same on all."""
        if "loss_l1" in metrics:
            weights = self.context.weights
            metrics["l1_coef"] = weights.l1
            rate = self.config.optimisation.l1_rate
            weights.l1 = adapted_l1(weights.l1, metrics["experts_per_token"], weights.target_k, rate)

    def _noise(self, step: int, turn: int) -> RouterNoise | None:
        """On the router scores of micro-batch `turn` of this rank."""
        o, run = self.config.optimisation, self.config.run
        std = linear_decay(o.router_noise, o.router_noise_share, step, self.last_step)
        return RouterNoise(std, (run.seed, step, turn, self.process.rank)) if std > 0 else None

    def _batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of an optimizer step (from 1)."""
        device = self.process.device
        if self.config.data.packing:
            return [pack(examples, device) for examples in self.data.micro_batches(step - 1)]
        return [collate(examples, self.pad_id, device) for examples in self.data.micro_batches(step - 1)]

    def _agreed_batches(self, step: int) -> tuple[list[dict[str, Tensor]], Tensor]:
        """This rank's micro-batches, and what a summed loss is multiplied with, so that the engine's mean over ranks and
        micro-batches becomes the mean over the answers of the whole optimizer step.

        Raises:
            UserError: on a rank that cannot read a row; PeerError on the others.
        """
        batches: list[dict[str, Tensor]] = []
        unread: UserError | None = None
        try:
            batches = self._batches(step)
        except UserError as error:
            unread = error
        targets = [b["labels"] if b["labels"].dim() == 1 else next_tokens(b["labels"]) for b in batches]
        answers = sum(
            (answer_count(t) for t in targets), torch.zeros((), dtype=torch.int64, device=self.process.device)
        )
        counts = torch.stack([answers, torch.tensor(int(unread is not None), device=self.process.device)])
        dist.all_reduce(counts)
        if counts[1] > 0:
            with raise_on_all_ranks(f"reading the rows of step {step}"):
                if unread is not None:
                    raise unread
        return batches, self.process.world_size * len(batches) / counts[0].clamp_min(1).float()
