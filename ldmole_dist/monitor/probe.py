"""A few fixed sequences whose routing is compared from evaluation to evaluation: has the router settled?"""

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
from ldmole_dist.model.forward import route
from ldmole_dist.monitor.supports import Supports

SEQUENCES = 16  # of up to 1024 tokens and 8 experts, in 224 linears: 4 MB


class Probe:
    """Remembers which experts every real token of the probe set had in every linear.

    Args:
        examples: of which the first `SEQUENCES` are the probe set; on every rank the same.
        pad_id: for batches.
        batch_size: sequences of one forward.
        process: of this rank, which keeps its share.
    """

    def __init__(self, examples: Sequence[Encoded], pad_id: int, batch_size: int, process: Process) -> None:
        chosen = list(examples[:SEQUENCES])
        share = -(-len(chosen) // process.world_size)
        mine = chosen[process.rank :: process.world_size]
        self.counted = len(mine)
        # A rank with fewer runs as many forwards, with sequences that it does not count.
        self.examples = (mine + chosen[:1] * share)[:share]
        self.pad_id, self.batch_size, self.process = pad_id, batch_size, process
        self._before: Supports | None = None

    def changed(self, engine: Engine) -> dict[str, float]:
        """Route the probe set; every rank calls it.

        Returns:
            For each linear the share (0 to 1) of real tokens whose active experts are others than at the last call; empty at
            the first.
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
            supports(name, routing, counted_T)

        was_training = model.training
        model.eval()
        for start in range(0, len(self.examples), self.batch_size):
            heartbeat("routing the probe set")
            batch = collate(self.examples[start : start + self.batch_size], self.pad_id, self.process.device)
            mask = batch["attention_mask"].bool()
            mask[max(self.counted - start, 0) :] = False
            counted_T = mask.flatten()
            route(model, batch, observe)
        model.train(was_training)
        return supports
