"""Workload and strategy, the two arguments of every estimate."""

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
Quantization = Literal["nf4", "int8"]
Offload = Literal["none", "optimizer", "optimizer+params"]
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, eq=False)
class Workload:
    """Model and batch sizes that one rank trains with in an optimizer step.

    Args:
        backbone: Config of a Hugging Face causal language model; its weights are not needed.
        num_experts: Experts per adapted linear, E.
        lora_rank: LoRA rank of each expert, R.
        lambda_hidden: Hidden units of the lambda-MLP.
        target_modules: Names of the linears to adapt.
        micro_batch: Sequences per forward.
        accumulation: Micro-batches per rank and optimizer step.
        seq: Tokens per sequence; none of them is padding.
        answer_tokens: Number of positions per sequence whose logits are computed; None for all.
        active: Mean number of active experts per token and linear. Routing is assumed to be balanced and independent between
            linears.
        precision: Data type of the frozen backbone and of the activations.
        quantization: Quantization of the frozen linears; None for none.
        padded: Whether attention keeps a mask, as in batches with padding.
        dropout: Dropout probability of the adapters' input.
        on_cpu: Whether training runs on a CPU, which changes when `apply_experts` computes all experts for all rows.

    Raises:
        UserError: If a number is out of range.
    """

    backbone: PretrainedConfig
    num_experts: int = 8
    lora_rank: int = 8
    lambda_hidden: int = 256
    target_modules: tuple[str, ...] = LINEARS
    micro_batch: int = 8
    accumulation: int = 1
    seq: int = 1024
    answer_tokens: int | None = None
    active: float = 2.0
    precision: Precision = "bf16"
    quantization: Quantization | None = None
    padded: bool = True
    dropout: float = 0.1
    on_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "lora_rank", "lambda_hidden", "micro_batch", "accumulation", "seq"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 1 <= self.active <= self.num_experts:
            raise UserError(f"active={self.active} must be between 1 and num_experts={self.num_experts}.")
        if self.answer_tokens is not None and not 1 <= self.answer_tokens <= self.seq:
            raise UserError(f"answer_tokens={self.answer_tokens} must be between 1 and seq={self.seq}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be in [0, 1).")

    # PretrainedConfig is neither hashable nor frozen, so compare and hash its JSON; workloads are keys of caches.
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
        """Number of tokens in one forward on one rank, T."""
        return self.micro_batch * self.seq

    @property
    def answers(self) -> int:
        """Number of positions in one forward on one rank whose logits are computed."""
        return self.micro_batch * (self.answer_tokens or self.seq)

    @property
    def itemsize(self) -> int:
        """Bytes per element of the backbone and of the activations."""
        return ITEMSIZE[self.precision]

    @property
    def dense(self) -> bool:
        """Whether every token uses all experts, so that no estimate depends on the routing."""
        return self.active == self.num_experts


@dataclass(frozen=True)
class Strategy:
    """Distribution of a workload over ranks.

    Args:
        ranks: World size.
        stage: ZeRO stage.
        ep_size: Number of ranks that share one copy of the experts.
        dispatch: Mode of the expert-parallel dispatch (`parallel.dispatch.ExpertParallel`).
        checkpointing: Whether decoder layers are recomputed in the backward.
        offload: States that the shipped DeepSpeed config keeps in host memory.
        zero: (key, value) pairs that override the section `zero_optimization` of the shipped config.

    Raises:
        UserError: If a value is out of range, `ep_size` does not divide `ranks`, or no config is shipped for the stage with the
            offload.
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
            raise UserError(f"ranks={self.ranks} must be at least 1.")
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"stage={self.stage} must be 0, 1, 2 or 3.")
        check_ep_size(self.ep_size, self.ranks)
        if (self.stage, self.offload) not in SHIPPED:
            known = ", ".join(f"stage {stage} with {offload!r}" for stage, offload in SHIPPED)
            raise UserError(
                f"No config is shipped for stage={self.stage} with offload={self.offload!r}; use one of: {known}."
            )

    @property
    def expert_copies(self) -> int:
        """Number of ranks that hold the same experts, which is the size of the expert-data-parallel group."""
        return self.ranks // self.ep_size

    @property
    def deepspeed(self) -> str:
        """Name of the DeepSpeed config in ds_configs/."""
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
    """Raise UserError if a strategy does not fit a workload; memory is not checked.

    ep_size must divide num_experts, and the ZeRO stage must support the precision and the quantization.
    """
    experts = workload.num_experts
    if experts % strategy.ep_size:
        divisors = ", ".join(str(p) for p in range(1, experts + 1) if experts % p == 0)
        raise UserError(f"ep_size={strategy.ep_size} does not divide num_experts={experts}; use one of {divisors}.")
    if workload.precision == "fp16" and strategy.stage == 0:
        raise UserError(
            "precision='fp16' needs a loss scale, which ZeRO stage 0 does not have; use another stage or precision."
        )
    if workload.quantization is not None and strategy.stage == 3:
        raise UserError(
            f"the plan does not support quantization={workload.quantization!r} at ZeRO stage 3, where each rank first loads "
            "all weights; use another stage."
        )
