"""The all-to-all is in flight while the frozen linears compute, forward and backward, with the same gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.loss import answer_count, next_tokens
from ldmole_dist.parallel.dispatch import Mode
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.selftest.reference import build, loss_of
from ldmole_dist.selftest.tiny import micro_batch
from ldmole_dist.tuner.layer import LdMoleLinear

Result = tuple[dict[str, Tensor], dict[str, int]]


class InFlight:
    """Wrapper of torch's all-to-all that counts those in flight: started, but not waited for."""

    def __init__(self) -> None:
        self.now = 0
        self._real = dist.all_to_all_single

    def all_to_all_single(self, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        work = self._real(*args, async_op=async_op, **kwargs)
        if not async_op:
            return work
        self.now += 1
        return PendingWork(self, work)


class PendingWork:
    def __init__(self, in_flight: InFlight, work: Any) -> None:
        self.in_flight, self.work = in_flight, work

    def wait(self) -> None:
        self.work.wait()
        self.in_flight.now -= 1


def run(overlap: bool, mode: Mode, checkpointing: bool) -> Result:
    """Return all gradients, and the number of all-to-alls in flight after each frozen linear."""
    process = start()
    model = build("llama", torch.float64, expert_parallel(2, mode, overlap), checkpointing)
    found: dict[str, int] = {}
    in_flight = InFlight()
    leaders = [m for m in model.modules() if isinstance(m, LdMoleLinear) and m.groups["default"].linears[0] is m]
    for module in leaders:
        name = module.name
        base: Any = module.base_layer
        base.register_forward_hook(lambda *_, name=name: found.update({f"forward {name}": in_flight.now}))
        base.register_full_backward_hook(lambda *_, name=name: found.update({f"backward {name}": in_flight.now}))
    batch = micro_batch(process.rank, process.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", in_flight.all_to_all_single)
        loss_of(model, model, batch, answer_count(next_tokens(batch["labels"])))[0].backward()
    assert in_flight.now == 0
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("mode", ["auto", "all_to_all", "gather"])
def test_frozen_linears_overlap_with_all_to_all(ranks2: LocalRanks, mode: Mode, checkpointing: bool) -> None:
    for (gradients, found), (gradients_waiting, found_waiting) in zip(
        ranks2.run(run, True, mode, checkpointing), ranks2.run(run, False, mode, checkpointing), strict=True
    ):
        forward = [n for name, n in found.items() if name.startswith("forward")]
        # The embeddings need no gradient, so the first group's frozen linear has no backward.
        backward = [
            n for name, n in found.items() if name.startswith("backward") and "layers.0.self_attn.q" not in name
        ]
        assert forward == [1] * 8 and backward == [1] * 7
        assert set(found_waiting.values()) == {0}
        assert gradients.keys() == gradients_waiting.keys()
        for name, gradient in gradients.items():
            assert gradient.equal(gradients_waiting[name]), name
