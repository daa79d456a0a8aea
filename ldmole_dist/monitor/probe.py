"""Probe set: fixed sequences whose routing is compared between evaluations, to show whether the routing has converged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.cluster.heartbeat import heartbeat
from ldmole_dist.data.batches import collate
from ldmole_dist.data.encode import Encoded
from ldmole_dist.distributed import Process
from ldmole_dist.engine.build import Engine
from ldmole_dist.method.routers import Routing
from ldmole_dist.model.forward import observe_routing
from ldmole_dist.monitor.supports import Supports

# Kept small to save memory: 16 sequences of 1024 tokens with 8 experts in 224 linears take 4 MB, at one bit per token and
# expert.
SEQUENCES = 16


class Probe:
    """Measures how the active experts of a fixed probe set change from one evaluation to the next.

    Args:
        examples: tokenized sequences, the same on every rank; the first `SEQUENCES` form the probe set.
        pad_id: token id of the padding.
        batch_size: sequences per forward of a rank.
        process: this rank, which routes its share of the probe set.
    """

    def __init__(self, examples: Sequence[Encoded], pad_id: int, batch_size: int, process: Process) -> None:
        chosen = list(examples[:SEQUENCES])
        share = -(-len(chosen) // process.world_size)
        mine = chosen[process.rank :: process.world_size]
        self.counted = len(mine)
        # Forwards contain collectives, so every rank must run the same number: pad with sequences that are not counted.
        self.examples = (mine + chosen[:1] * share)[:share]
        self.pad_id, self.batch_size, self.process = pad_id, batch_size, process
        self._before: Supports | None = None

    def changed(self, engine: Engine) -> dict[str, float]:
        """Route the probe set and compare its active experts with those of the previous call.

        Collective: every rank must call it.

        Returns:
            Name of a linear -> share (0 to 1) of real tokens whose set of active experts changed; empty at the first call.
            Linears that do not read one row per token are left out, such as the down_proj of routed experts, which has one
            row for each pair of token and base expert.
        """
        before, self._before = self._before, self._supports(engine)
        if before is None:
            return {}
        counts = self._before.changed_from(before)
        total = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.process.device)
        dist.all_reduce(total)
        return {name: changed / max(tokens, 1) for name, (changed, tokens) in zip(counts, total.tolist(), strict=True)}

    def _supports(self, engine: Engine) -> Supports:
        model, supports = engine.module, Supports()
        counted_T: Tensor

        def observe(name: str, routing: Routing, _: Tensor | None) -> None:
            if len(routing.p_TE) == len(counted_T):
                supports(name, routing, counted_T)

        was_training = model.training
        model.eval()
        for start in range(0, len(self.examples), self.batch_size):
            heartbeat("routing the probe set")
            batch = collate(self.examples[start : start + self.batch_size], self.pad_id, self.process.device)
            mask = batch["attention_mask"].bool()
            mask[max(self.counted - start, 0) :] = False
            counted_T = mask.flatten()
            observe_routing(model, batch, observe)
        model.train(was_training)
        return supports
