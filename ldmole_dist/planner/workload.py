"""What is trained, and how it is spread: the two arguments of every function of the planner."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from transformers import PretrainedConfig

from ldmole_dist.config import check_ep_size
from ldmole_dist.config.adapter import LINEARS
from ldmole_dist.errors import UserError
from ldmole_dist.parallel.dispatch import Mode

Precision = Literal["fp32", "bf16", "fp16"]
Offload = Literal["none", "optimizer", "optimizer+params"]
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, eq=False)
class Workload:
    """What one rank trains in an optimizer step.

    Args:
        backbone: config of a Hugging Face causal language model; its weights are not needed.
        num_experts: E.
        rank: of every expert.
        lambda_hidden: units of the lambda-MLP.
        target_modules: names of the linears to adapt.
        micro_batch: sequences of one forward.
        accumulation: micro-batches of one rank in an optimizer step.
        seq: positions of a sequence, all taken as real tokens.
        answer_tokens: positions of a sequence whose logits are computed; None for all.
        active: mean number of experts of a token; experts are taken as equally popular and independently chosen.
        precision: of the frozen backbone and the activations.
        padded: whether a batch holds padding: attention then needs a mask, and keeps it.
        dropout: on the input of the adapters.
        on_cpu: whether it trains on a CPU, which takes another formulation for many experts.
    """

    backbone: PretrainedConfig
    num_experts: int = 8
    rank: int = 8
    lambda_hidden: int = 256
    target_modules: tuple[str, ...] = LINEARS
    micro_batch: int = 8
    accumulation: int = 1
    seq: int = 1024
    answer_tokens: int | None = None
    active: float = 2.0
    precision: Precision = "bf16"
    padded: bool = True
    dropout: float = 0.1
    on_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "rank", "lambda_hidden", "micro_batch", "accumulation", "seq"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.active <= self.num_experts:
            raise UserError(f"active={self.active} must lie between 1 and num_experts={self.num_experts}")
        if self.answer_tokens is not None and not 1 <= self.answer_tokens <= self.seq:
            raise UserError(f"answer_tokens={self.answer_tokens} must lie between 1 and seq={self.seq}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must lie in [0, 1)")

    @cached_property
    def _key(self) -> tuple[object, ...]:
        values = [getattr(self, field.name) for field in fields(self) if field.name != "backbone"]
        return self.backbone.to_json_string(), *values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Workload) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def tokens(self) -> int:
        """T, of one forward on one rank."""
        return self.micro_batch * self.seq

    @property
    def answers(self) -> int:
        """Positions of one forward whose logits are computed."""
        return self.micro_batch * (self.answer_tokens or self.seq)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the backbone and of the activations."""
        return ITEMSIZE[self.precision]

    @property
    def dense(self) -> bool:
        """Whether every token uses all experts: then nothing about the routing is an expectation."""
        return self.active == self.num_experts


@dataclass(frozen=True)
class Strategy:
    """How it is spread over ranks.

    Args:
        ranks: of the run.
        stage: of ZeRO.
        ep_size: ranks that share one copy of the experts.
        dispatch: what moves between them (`parallel.dispatch.ExpertParallel`).
        checkpointing: whether decoder layers are recomputed in the backward.
        offload: what is kept in host memory, as the files of ds_configs/ do it.
        zero: settings that replace those of that file's zero_optimization.
    """

    ranks: int
    stage: int = 2
    ep_size: int = 1
    dispatch: Mode = "auto"
    checkpointing: bool = True
    offload: Offload = "none"
    zero: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"ranks={self.ranks} must be at least 1")
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"stage={self.stage} must be 0, 1, 2 or 3")
        check_ep_size(self.ep_size, self.ranks)
        if (self.stage, self.offload) not in SHIPPED:
            known = ", ".join(f"stage {stage} with {offload!r}" for stage, offload in SHIPPED)
            raise UserError(f"offload={self.offload!r} at stage {self.stage} is not shipped; there are {known}")

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts: the expert-data-parallel group."""
        return self.ranks // self.ep_size

    @property
    def deepspeed(self) -> str:
        """Name of the file in ds_configs/."""
        return SHIPPED[self.stage, self.offload]


SHIPPED: dict[tuple[int, Offload], str] = {
    (0, "none"): "zero0",
    (1, "none"): "zero1",
    (2, "none"): "zero2",
    (2, "optimizer"): "zero2_offload",
    (3, "none"): "zero3",
    (3, "optimizer+params"): "zero3_offload",
}


def check(workload: Workload, strategy: Strategy) -> None:
    """Raises UserError where the experts cannot be spread so, or the precision cannot be trained at this stage."""
    if workload.num_experts % strategy.ep_size:
        raise UserError(
            f"num_experts={workload.num_experts} is no multiple of ep_size={strategy.ep_size}: choose ep_size among "
            f"{[p for p in range(1, workload.num_experts + 1) if workload.num_experts % p == 0]}"
        )
    if workload.precision == "fp16" and strategy.stage == 0:
        raise UserError("fp16 needs ZeRO stage 1, 2 or 3, which scale the loss")
