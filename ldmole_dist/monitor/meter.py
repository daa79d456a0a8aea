"""Metrics of one optimizer step: sums over its micro-batches, reduced over all ranks with one all-reduce.

Every rank collects the same metrics in the same steps, so that the reduced tensors have the same layout.
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

# Summed over micro-batches and ranks; "decisions" counts (token, linear) pairs.
SUMS = ("loss", "loss_task", *(f"loss_{term}" for term in TERMS), "active", "lambda", "decisions", "tokens")


class Report(NamedTuple):
    """Metrics of one optimizer step, equal on every rank.

    Args:
        metrics: name -> number, or a dictionary of numbers.
        routing: name of a linear -> statistics from `statistics.summarize`; empty unless the report is detailed.
    """

    metrics: dict[str, Any]
    routing: dict[str, dict[str, Any]]


class StepMeter:
    """Collector of the metrics of one optimizer step; every rank creates one per step.

    Args:
        engine: that runs the step.
        process: this rank.
        detailed: whether to add routing by linear, gradient norms by part, times and memory.
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
        """Add a micro-batch to the sums, after its forward.

        Args:
            loss: total loss, a detached scalar.
            task: task loss, a detached scalar.
            batch: from `collate` or `pack`.
        """
        tokens = real_tokens(batch)
        active, lam, decisions = torch.stack(list(self.context.stats.values())).sum(0)
        auxiliary = [torch.as_tensor(self.context.mean(term)).detach() for term in TERMS]
        values = [loss, task, *auxiliary, active, lam, decisions, tokens]
        self._sums += torch.stack([v.to(device=loss.device, dtype=torch.float64) for v in values])
        self._micro_batches += 1

    def report(self) -> Report:
        """Return the metrics of all ranks; every rank calls this after the last backward and before the update."""
        self.context.observer, self.wire.clock.on = None, False
        groups, table = self.wire.table()
        routed = self._routed.by_linear
        # One all-reduce and one copy to the host for everything: each of them synchronizes the GPU.
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
            # Over all linears together: lambda has the same scale in each, whereas expert indices are unrelated.
            metrics["lambda_std"] = summarize(merge_sums(by_linear.values()))["lambda_std"]
        metrics["dead_experts"] = sum(summary["dead_experts"] for summary in routing.values())
        metrics |= self._extremes()  # before the gradient norms, whose own buffers would raise the peak
        metrics["grad_norm_by_part"] = gradient_norms(self.engine)
        return Report(metrics, routing)

    def _means(self, total: dict[str, float]) -> dict[str, Any]:
        """Return the metrics of every step from the sums over micro-batches and ranks."""
        decisions = max(total["decisions"], 1)
        # Losses that the router lacks are left out: a 0 would look like a measurement.
        losses = ["loss", "loss_task", *(f"loss_{term}" for term in TERMS if term in self.context.terms)]
        means = {name: total[name] / (self._micro_batches * self.process.world_size) for name in losses}
        means["experts_per_token"] = total["active"] / decisions
        if not math.isnan(total["lambda"]):  # NaN if the router has no lambda
            means["lambda_mean"] = total["lambda"] / decisions
        return means | {"tokens": total["tokens"]}

    def _extremes(self) -> dict[str, Any]:
        """Return the peak memory and dispatch times, each the maximum over ranks."""
        values = [self.process.peak_memory(), *(self.wire.clock.seconds(part) for part in TIMED)]
        largest = torch.tensor(values, dtype=torch.float64, device=self.process.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        memory, *seconds = largest.tolist()
        return {"peak_memory_gb": memory / 1e9} | (
            {"dispatch_seconds": dict(zip(TIMED, seconds, strict=True))} if self.engine.parallel.size > 1 else {}
        )


def _by_group(groups: list[str], elements_GK: Tensor) -> dict[str, dict[str, int]]:
    """Return the number of elements of each kind that each input group sent, without zeros."""
    return {
        group: {kind: number for kind, number in zip(KINDS, of_group, strict=True) if number}
        for group, of_group in zip(groups, elements_GK.tolist(), strict=True)
    }
