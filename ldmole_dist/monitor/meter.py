"""Metrics of one optimizer step, reduced over its micro-batches and over all ranks.

A step needs one all-reduce, a detailed report two more. Every rank collects the same metrics in the same steps, so that the
reduced tensors have the same layout.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.data.batches import real_tokens
from ldmole_dist.distributed import Process
from ldmole_dist.engine.build import Engine
from ldmole_dist.engine.grad_norms import gradient_norms
from ldmole_dist.method.context import TERMS
from ldmole_dist.method.statistics import RoutingSums, merge_sums, summarize
from ldmole_dist.parallel.wire import KINDS, TIMED
from ldmole_dist.tuner.model import tuner_of

# Metrics that are summed over micro-batches and ranks. "decisions" is the number of (token, linear) pairs, over which "active"
# and "lambda" are summed.
SUMS = ("loss", "loss_task", *(f"loss_{term}" for term in TERMS), "active", "lambda", "decisions", "tokens")


class Report(NamedTuple):
    """Metrics of one optimizer step; `StepMeter.report` returns the same ones on every rank.

    Args:
        metrics: name -> number, or nested dictionary of numbers.
        routing: name of a linear -> statistics from `statistics.summarize`; empty unless the report is detailed.
    """

    metrics: dict[str, Any]
    routing: dict[str, dict[str, Any]]


class StepMeter:
    """Collector of the metrics of one optimizer step.

    Every rank creates one meter per step, before the first forward. The constructor resets the counters of sent elements and
    the times of the dispatch.

    Args:
        engine: engine that runs the step.
        process: this rank.
        detailed: also report the routing of each linear, the standard deviation of lambda, the number of dead experts, gradient
            norms by part, peak memory and, if experts are spread over ranks, elements sent by input group and dispatch times.
    """

    def __init__(self, engine: Engine, process: Process, detailed: bool) -> None:
        self.engine, self.process, self.detailed = engine, process, detailed
        self.context, self.wire = tuner_of(engine.module).context, engine.parallel.wire
        self.wire.clear()
        self.wire.clock.on = detailed
        self._routed = RoutingSums()
        self.context.observer = self._routed if detailed else None
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64, device=process.device)
        self._micro_batches = 0

    def add(self, loss: Tensor, task: Tensor, batch: dict[str, Tensor]) -> None:
        """Add a micro-batch to the sums; call it after its forward and before the next one.

        Args:
            loss: total loss, a detached scalar.
            task: task loss, a detached scalar.
            batch: return value of `collate` or `pack`.
        """
        tokens = real_tokens(batch)
        active, lam, decisions = torch.stack(list(self.context.stats.values())).sum(0)
        auxiliary = [torch.as_tensor(self.context.mean(term)).detach() for term in TERMS]
        values = [loss, task, *auxiliary, active, lam, decisions, tokens]
        self._sums += torch.stack([v.to(device=loss.device, dtype=torch.float64) for v in values])
        self._micro_batches += 1

    def report(self) -> Report:
        """Reduce the metrics over all ranks and return them.

        Collective: every rank must call it, after the last backward and before the update.
        """
        self.context.observer, self.wire.clock.on = None, False
        groups, table = self.wire.table()
        routed = self._routed.by_linear
        # A single all-reduce and a single copy to the host for all sums: every copy waits for the GPU.
        reduced = torch.cat([self._sums, table.flatten().to(self._sums), *routed.values()])
        dist.all_reduce(reduced)
        sums, sent, routing_sums = reduced.cpu().split(
            [len(SUMS), table.numel(), len(reduced) - len(SUMS) - table.numel()]
        )
        metrics = self._means(dict(zip(SUMS, sums.tolist(), strict=True)))
        elements, sizes = sent.long().view(table.shape)
        metrics |= {"wire_elements": int(elements.sum()), "wire_bytes": int(sizes.sum())}
        if groups:
            metrics["wire"] = dict(zip(KINDS, elements.sum(0).tolist(), strict=True))
        if not self.detailed:
            return Report(metrics, {})
        if groups:
            metrics["wire_by_group"] = _by_group(groups, elements)
        by_linear = dict(zip(routed, routing_sums.split([len(s) for s in routed.values()]), strict=True))
        routing = {name: summarize(linear_sums) for name, linear_sums in by_linear.items()}
        if "lambda_mean" in metrics:
            # Lambda has the same scale in all linears, so its spread is taken over all of them. Experts with the same index in
            # different linears are unrelated, so the other statistics are not merged.
            metrics["lambda_std"] = summarize(merge_sums(by_linear.values()))["lambda_std"]
        metrics["dead_experts"] = sum(summary["dead_experts"] for summary in routing.values())
        metrics |= self._extremes()  # before the gradient norms, whose own buffers would raise the peak
        metrics["grad_norm_by_part"] = gradient_norms(self.engine)
        return Report(metrics, routing)

    def _means(self, total: dict[str, float]) -> dict[str, Any]:
        """Return the mean losses, the routing means and the number of tokens, from the sums over micro-batches and ranks."""
        decisions = max(total["decisions"], 1)
        # Losses that the router lacks are left out: a 0 would look like a measurement.
        losses = ["loss", "loss_task", *(f"loss_{term}" for term in TERMS if term in self.context.terms)]
        means = {name: total[name] / (self._micro_batches * self.process.world_size) for name in losses}
        means["experts_per_token"] = total["active"] / decisions
        if not math.isnan(total["lambda"]):  # NaN if the router has no lambda
            means["lambda_mean"] = total["lambda"] / decisions
        return means | {"tokens": total["tokens"]}

    def _extremes(self) -> dict[str, Any]:
        """Return the peak memory and, if experts are spread over ranks, the dispatch times: maxima over ranks. Collective."""
        values = [self.process.peak_memory(), *(self.wire.clock.seconds(part) for part in TIMED)]
        largest = torch.tensor(values, dtype=torch.float64, device=self.process.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        memory, *seconds = largest.tolist()
        return {"peak_memory_gb": memory / 1e9} | (
            {"dispatch_seconds": dict(zip(TIMED, seconds, strict=True))} if self.engine.parallel.size > 1 else {}
        )


def _by_group(groups: list[str], elements_GK: Tensor) -> dict[str, dict[str, int]]:
    """Return the number of elements sent, by input group and kind, without zeros.

    Args:
        groups: names of G input groups.
        elements_GK: (G, K) number of elements, with the K kinds in the order of `KINDS`.
    """
    return {
        group: {kind: number for kind, number in zip(KINDS, of_group, strict=True) if number}
        for group, of_group in zip(groups, elements_GK.tolist(), strict=True)
    }
