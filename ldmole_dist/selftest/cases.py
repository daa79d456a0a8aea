"""Cases of the selftest other than parity: process group, collectives, replay of routing decisions, half precision.

Each case is a function that every rank runs. It returns a dict from the name of a comparison to the distance that this rank
found: a relative error or a count, such as the number of wrong elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from ldmole_dist.engine.experts import expert_parallel
from ldmole_dist.engine.startup import start
from ldmole_dist.loss import answer_count, next_tokens
from ldmole_dist.parallel.exchange import Payload, exchange
from ldmole_dist.parallel.wire import Tally, Wire
from ldmole_dist.selftest.reference import build, loss_of
from ldmole_dist.selftest.tiny import micro_batch, relative
from ldmole_dist.tuner.layer import LdMoleLinear

Decide = Callable[[Tensor, Tensor], Tensor]  # (logits_TE, lam_T) -> support_TE, like `Router.decide`

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def joined(size: int) -> dict[str, float]:
    """Return, as "missing ranks", by how many ranks the process group is smaller than `size`."""
    return {"missing ranks": float(size - start().world_size)}


def collectives() -> dict[str, float]:
    """Return the number of wrong elements of each collective and dtype.

    The collectives are an all-to-all with uneven splits, its backward (floating-point dtypes only), an all-gather and an
    all-reduce.
    """
    process = start()
    rank, world, device, group = process.rank, process.world_size, process.device, dist.group.WORLD
    assert group is not None, "start() has joined the process group"
    wrong = {}

    def rows(source: int, destination: int, dtype: torch.dtype) -> Tensor:
        # The last rank sends nothing, and others send nothing to some ranks: a rank without tokens must not block the others.
        count = 0 if source == world - 1 and world > 1 else (3 * source + destination) % 4
        return torch.full((count, 2), 1 + source * world + destination, device=device, dtype=dtype)

    for dtype in DTYPES:
        out = [rows(rank, other, dtype) for other in range(world)]
        expected = [rows(other, rank, dtype) for other in range(world)]
        send, recv = [len(part) for part in out], [len(part) for part in expected]
        x = torch.cat(out).requires_grad_(dtype.is_floating_point)
        (y,) = exchange([Payload("rows", x, send, recv)], group, Tally(Wire(), "selftest"))
        wrong[f"all-to-all {dtype}"] = float((y != torch.cat(expected)).sum())
        if dtype.is_floating_point:
            y.backward(y.detach().clone())
            assert x.grad is not None
            wrong[f"all-to-all back {dtype}"] = float((x.grad != x).sum())
        own = torch.full((3,), 1 + rank, device=device, dtype=dtype)
        gathered = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(gathered, own)
        wrong[f"all-gather {dtype}"] = float(sum(int((p != 1 + other).sum()) for other, p in enumerate(gathered)))
        dist.all_reduce(own)
        wrong[f"all-reduce {dtype}"] = float((own != world * (world + 1) // 2).sum())
    return wrong


def replay(ep_size: int) -> dict[str, float]:
    """Compare the gradients with and without checkpointing, with routers that decide at random in each call.

    Recomputed layers must replay the recorded routing decisions; otherwise the gradients differ, and the numbers of rows that
    ranks exchange do not match.

    Args:
        ep_size: number of ranks that share one copy of the experts.

    Returns:
        Relative distance of each gradient, and the number of elements of kind "counts" (`parallel.wire`) that the
        recomputation sent again, which is 0 if it replays the decisions.
    """
    parallel = expert_parallel(ep_size)
    found = []
    for checkpointing in (False, True):
        model = build("llama", torch.float64, parallel, checkpointing)
        for router in _routers(model):
            router.decide = _random_decide()
        parallel.wire.clear()
        _loss(model).backward()
        found.append((_gradients(model), parallel.wire.by_kind()["counts"]))
    (plain, plain_counts), (recomputed, recomputed_counts) = found
    distances = {name: relative(recomputed[name], plain[name]) for name in plain}
    return distances | {"counts exchanged again": float(recomputed_counts - plain_counts)}


def _random_decide() -> Decide:
    """Return a function that activates each expert with probability 0.4, and expert 0 for tokens without any other."""
    generator = torch.Generator().manual_seed(start().rank)

    def decide(logits_TE: Tensor, lam_T: Tensor) -> Tensor:
        support_TE = torch.rand(logits_TE.shape, generator=generator) < 0.4
        support_TE[..., 0] |= ~support_TE.any(-1)
        return support_TE.to(logits_TE.device)

    return decide


def half_precision(architecture: str, ep_size: int) -> dict[str, float]:
    """Compare loss and gradients of a bfloat16 backbone with those of a float32 backbone; both have float32 adapters.

    Both backbones have the same weights. Both models use the routing decisions of the float32 model, because a gradient is
    discontinuous where a token crosses the boundary of a support. The B matrices and the router weights are smaller than in the
    other cases, where the tiny model amplifies rounding errors by a factor of about 100.

    Args:
        architecture: "llama" or "qwen3".
        ep_size: number of ranks that share one copy of the experts.

    Returns:
        Relative distance of the loss and each gradient, and the number of gradients that are not in float32.
    """
    parallel = expert_parallel(ep_size)
    wide = build(architecture, torch.bfloat16, parallel).float()
    half = build(architecture, torch.bfloat16, parallel)
    for model in (wide, half):
        _weaken(model)
    for leader, follower in zip(_routers(wide), _routers(half), strict=True):
        leader.decide, follower.decide = _recorded(leader.decide)
    losses = [_loss(model) for model in (wide, half)]
    for loss in losses:
        loss.backward()
    reference, gradients = _gradients(wide), _gradients(half)
    distances = {name: relative(gradients[name], reference[name]) for name in reference}
    distances["loss"] = relative(losses[1].detach(), losses[0].detach())
    distances["gradients not in float32"] = float(sum(g.dtype != torch.float32 for g in gradients.values()))
    return distances


@torch.no_grad()
def _weaken(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "router" in name:
            parameter.mul_(0.1 if "lora_B" in name else 0.25)


def _recorded(decide: Decide) -> tuple[Decide, Decide]:
    """Return two functions: the first records the decisions of `decide`, the second returns them in the same order."""
    supports: list[Tensor] = []

    def record(logits_TE: Tensor, lam_T: Tensor) -> Tensor:
        supports.append(decide(logits_TE, lam_T))
        return supports[-1]

    return record, lambda logits_TE, lam_T: supports.pop(0)


def _routers(model: PeftModel) -> Iterator[Any]:
    return (module.ldmole_adapters["default"].router for module in model.modules() if isinstance(module, LdMoleLinear))


def _loss(model: PeftModel) -> Tensor:
    process = start()
    batch = micro_batch(process.rank, process.device)
    return loss_of(model, model, batch, answer_count(next_tokens(batch["labels"])))[0]


def _gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
