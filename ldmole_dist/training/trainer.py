"""Training loop: optimizer steps, evaluations, reports, checkpoints, and errors that stop all ranks together."""

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
from ldmole_dist.method.losses import next_l1_coefficient
from ldmole_dist.method.noise import RouterNoise, linear_decay
from ldmole_dist.model.forward import batch_logits
from ldmole_dist.monitor.meter import Report, StepMeter
from ldmole_dist.monitor.probe import Probe
from ldmole_dist.monitor.writer import Monitor
from ldmole_dist.training.nonfinite import explain_nonfinite
from ldmole_dist.training.preemption import StopRequest
from ldmole_dist.tuner.model import tuner_of


class Trainer:
    """Training loop of one run; every rank has one and makes the same calls.

    Args:
        config: config of the run.
        engine: engine that holds the model and its optimizer.
        data: micro-batches of this rank.
        evaluator: evaluator of the evaluation set; None without one.
        probe: probe set, whose routing is compared between evaluations.
        pad_id: token id of the padding.
        process: this rank.
        saver: writer of the checkpoints.
        first_step: number of optimizer steps that the resumed run has done; 0 for a fresh run.
        last_step: total number of optimizer steps of the run.
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
        with raise_on_all_ranks("opening the report files"):
            self.monitor = Monitor(Path(config.run.output_dir), process.is_main, first_step)
        self.context = tuner_of(engine.module).context

    def run(self) -> dict[str, float]:
        """Train to the last step. Collective: every rank must call it.

        Returns:
            Metrics of the final evaluation; empty without an evaluator.

        Raises:
            NonFiniteLoss: on every rank, if the loss, the gradient or the evaluation loss is not finite; the message names the
                step and, if they can be found, rank and layer.
            Preempted: on every rank, if any rank received a stop signal before the last step; a checkpoint has then been saved.
            UserError, PeerError: on every rank, if data cannot be read, or reports or checkpoints cannot be written.
        """
        with self.stop:
            try:
                result = self._training_loop()
            except NonFiniteLoss:
                self.saver.finish()  # a checkpoint still being written holds an earlier, finite state
                raise
            finally:
                self.data.close()
                self.monitor.close()
            self._check_reports()
        return result

    def _training_loop(self) -> dict[str, float]:
        run = self.config.run
        if self.first_step >= self.last_step:  # nothing to train; a complete run has reported this evaluation already
            return self._evaluate(self.first_step)
        result = self._report_evaluation(0) if self.first_step == 0 and run.eval_before else {}
        steps = tqdm(
            range(self.first_step + 1, self.last_step + 1),
            desc="training",
            initial=self.first_step,
            total=self.last_step,
            disable=not self.process.is_main,
            unit="step",
        )
        for step in steps:
            report = self._train_step(step)
            self.monitor.step(step, report)
            loss, experts = report.metrics["loss"], report.metrics["experts_per_token"]
            steps.set_postfix(loss=f"{loss:.3f}", experts=f"{experts:.2f}")
            if step == self.last_step or (run.eval_every and step % run.eval_every == 0):
                result = self._report_evaluation(step)

            stop_requested, checkpoint_written, report_failed = self._reduce_flags()
            if checkpoint_written or report_failed:  # after a failed report, the pending checkpoint is still published
                self.saver.finish()
            if report_failed:
                self._check_reports()
            stopping = stop_requested and step < self.last_step
            if stopping or (run.save_every and step % run.save_every == 0):
                self.saver.save(self.engine, step)
            if stopping:
                self.saver.finish()
                remedy = "add run.resume=auto to the command" if run.resume == "never" else "run the same command again"
                raise Preempted(f"stop requested: saved after step {step} of {self.last_step}; to resume, {remedy}")
        self.saver.finish()
        return result

    def _train_step(self, step: int) -> Report:
        """Run optimizer step `step` (from 1) and return its report, equal on all ranks except for `tokens_per_second`."""
        started = time.perf_counter()
        meter = StepMeter(self.engine, self.process, detailed=step % self.config.run.detail_every == 0)
        batches, loss_factor = self._load_batches(step)
        losses = self._forward_backward(step, batches, loss_factor, meter)
        report = meter.report()  # before the update, which clears the gradients that a detailed report needs
        metrics = report.metrics
        if not math.isfinite(metrics["loss"]):
            self._raise_nonfinite_loss(step, metrics["loss"], batches, losses)

        metrics["lr"] = self.engine.learning_rate
        self.saver.wait_for_copy()
        self.engine.step()
        metrics["grad_norm"] = self.engine.grad_norm
        # In fp16, gradients may overflow until the loss scale is low enough: DeepSpeed skips the step and lowers the scale.
        if not math.isfinite(self.engine.grad_norm) and not self.engine.overflowed:
            self._raise_nonfinite_gradient(step, metrics["loss"], batches)

        self.context.noise = None  # evaluations route without noise
        self._adapt_l1(metrics)
        metrics["skipped_steps"] = self.engine.skipped_steps
        metrics["tokens_per_second"] = metrics.pop("tokens") / (time.perf_counter() - started)
        return report

    def _load_batches(self, step: int) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return this rank's micro-batches of a step, and the factor by which their task losses are multiplied.

        `answer_loss` sums over answers (tokens or class labels), and the engine averages over ranks and micro-batches. The
        factor turns that average into the mean loss per answer of the global batch, however it is split.

        Raises:
            UserError: on the lowest rank that cannot read a row.
            PeerError: on the other ranks in that case.
        """
        batches: list[dict[str, Tensor]] = []
        read_error: UserError | None = None
        try:
            batches = self._micro_batches(step)
        except UserError as error:
            read_error = error
        # Labels of sequence classification (1-D) are targets already; token labels are shifted by one position.
        targets = [b["labels"] if b["labels"].dim() == 1 else next_tokens(b["labels"]) for b in batches]
        answers = sum(
            (answer_count(t) for t in targets), torch.zeros((), dtype=torch.int64, device=self.process.device)
        )
        # The error flag shares the all-reduce of the count, so that a step without errors needs no further collective.
        counts = torch.stack([answers, torch.tensor(int(read_error is not None), device=self.process.device)])
        dist.all_reduce(counts)
        if counts[1] > 0:
            with raise_on_all_ranks(f"reading the rows of step {step}"):
                if read_error is not None:
                    raise read_error
        return batches, self.process.world_size * len(batches) / counts[0].clamp_min(1).float()

    def _micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        device = self.process.device
        if self.config.data.packing:
            return [pack(examples, device) for examples in self.data.micro_batches(step - 1)]
        return [collate(examples, self.pad_id, device) for examples in self.data.micro_batches(step - 1)]

    def _forward_backward(
        self, step: int, batches: list[dict[str, Tensor]], loss_factor: Tensor, meter: StepMeter
    ) -> list[Tensor]:
        """Accumulate the gradients of all micro-batches of a step and return their detached losses."""
        losses = []
        for index, batch in enumerate(batches):
            heartbeat(f"step {step}")
            self.context.noise = self._router_noise(step, index)
            targets, logits = batch_logits(self.engine, batch)
            task_loss = answer_loss(logits, targets, self.config.optimisation.label_smoothing)
            task_loss = task_loss * loss_factor.to(logits.device)
            loss = task_loss + self.context.auxiliary_loss()
            self.engine.backward(loss)
            losses.append(loss.detach())
            meter.add(loss.detach(), task_loss.detach(), batch)
            if index < len(batches) - 1:
                self.engine.step()  # DeepSpeed counts the micro-batch; only the last call, by the caller, updates
        return losses

    def _router_noise(self, step: int, micro_batch: int) -> RouterNoise | None:
        """Return the noise on the router scores of one micro-batch of this rank; None if the noise is zero."""
        o, run = self.config.optimisation, self.config.run
        std = linear_decay(o.router_noise, o.router_noise_share, step, self.last_step)
        return RouterNoise(std, (run.seed, step, micro_batch, self.process.rank)) if std > 0 else None

    def _raise_nonfinite_loss(
        self, step: int, loss: float, batches: list[dict[str, Tensor]], losses: list[Tensor]
    ) -> None:
        bad = next((index for index, value in enumerate(losses) if not value.isfinite()), None)
        self.context.noise = self._router_noise(step, bad or 0)  # repeat the forward with the same noise
        finding = explain_nonfinite(self.engine, batches[bad or 0], bad is not None)
        raise NonFiniteLoss(
            f"the loss is {loss} at step {step}; {finding}. Run again with run.resume=auto and a smaller "
            "optimisation.learning_rate; if the same step fails again, also set parallelism.precision=fp32."
        )

    def _raise_nonfinite_gradient(self, step: int, loss: float, batches: list[dict[str, Tensor]]) -> None:
        self.context.noise = self._router_noise(step, 0)
        finding = explain_nonfinite(self.engine, batches[0], False)
        raise NonFiniteLoss(
            f"the gradient norm is {self.engine.grad_norm} at step {step} although the loss is {loss}; {finding}. Run again "
            "with run.resume=auto and a smaller optimisation.learning_rate; in fp16 with a fixed loss_scale in section fp16 of "
            "the DeepSpeed config, set it to 0, which adapts it."
        )

    def _adapt_l1(self, metrics: dict[str, Any]) -> None:
        """Add the L1 coefficient of this step to the metrics and set that of the next step (router `relu` only).

        The coefficient depends only on metrics reduced over all ranks, so it is the same on every rank.
        """
        if "loss_l1" in metrics:
            weights = self.context.weights
            metrics["l1_coef"] = weights.l1
            rate = self.config.optimisation.l1_rate
            weights.l1 = next_l1_coefficient(weights.l1, metrics["experts_per_token"], weights.target_k, rate)

    def _report_evaluation(self, step: int) -> dict[str, float]:
        """Evaluate, measure how routing changed since the last evaluation, report both, and return the evaluation's metrics."""
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
            finding = explain_nonfinite(self.engine, self._micro_batches(max(step, 1))[0], False)
            remedy = (
                "Run again with run.resume=auto and a smaller optimisation.learning_rate."
                if step
                else "Check the backbone and adapter.init_from, or set parallelism.precision=fp32."
            )
            raise NonFiniteLoss(f"the evaluation loss after {step} steps is {result['eval_loss']}; {finding}. {remedy}")
        if self.process.is_main:
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))
        return result

    def _reduce_flags(self) -> tuple[bool, bool, bool]:
        """Reduce the flags of all ranks, so that all ranks act on them in the same step.

        Returns:
            Whether any rank received a stop signal; whether every rank has finished writing its file of the pending checkpoint,
            with or without an error; whether any rank failed to write a report.
        """
        own = [self.stop.requested, self.saver.done, self.monitor.failed]
        flags = torch.tensor(own, dtype=torch.int64, device=self.process.device)
        dist.all_reduce(flags)
        stop_requested, written, report_failed = flags.tolist()
        return stop_requested > 0, written == self.process.world_size, report_failed > 0

    def _check_reports(self) -> None:
        """If the reports could not be written, raise UserError on the rank that writes them and PeerError on the others.

        Collective: every rank must call it.
        """
        with raise_on_all_ranks("writing the reports"):
            self.monitor.check()
