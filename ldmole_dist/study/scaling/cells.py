"""Cells of the scaling study. A cell is one configuration to measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ldmole_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig

VOCABULARY = 4096
ANSWERS = 8  # the loss is computed on this number of tokens at the end of each sequence
LAMBDA_HIDDEN = 256  # hidden units of the lambda-MLP


@dataclass(frozen=True)
class Cell:
    """One configuration; the fields are keys of `cell` in cells.jsonl.

    Args:
        ranks: number of processes. Each has its own GPU, or all of them share the CPU's cores.
        ep_size: number of consecutive ranks that share one copy of the experts.
        stage: ZeRO stage.
        dispatch: "auto", "all_to_all" or "gather"; without effect if ep_size is 1.
        experts: number of experts per linear.
        lora_rank: LoRA rank of an expert.
        hidden: hidden size of the Llama; a multiple of 64, the width of an attention head.
        layers: number of decoder layers.
        micro_batch: sequences per rank and forward.
        accumulation: micro-batches per rank and optimizer step.
        seq: tokens per sequence.
        precision: precision of the frozen weights, "fp32" or "bf16".
    """

    ranks: int = 2
    ep_size: int = 2
    stage: int = 2
    dispatch: str = "auto"
    experts: int = 8
    lora_rank: int = 8
    hidden: int = 256
    layers: int = 4
    micro_batch: int = 4
    accumulation: int = 1
    seq: int = 128
    precision: str = "fp32"

    @property
    def tokens(self) -> int:
        """Number of tokens in an optimizer step, summed over ranks."""
        return self.ranks * self.micro_batch * self.accumulation * self.seq

    def backbone(self) -> LlamaConfig:
        """Return the Llama config with the sizes of this cell."""
        from ldmole_dist.study.random_model import llama_config  # imports torch, too slow for the argument parser

        heads = self.hidden // 64
        kv_heads = heads // 2 if heads % 2 == 0 else heads
        positions = max(2048, self.seq)
        sizes = self.hidden, self.hidden * 8 // 3, self.layers, heads, kv_heads, VOCABULARY
        return llama_config(*sizes, head_dim=64, max_position_embeddings=positions)

    def checked(self) -> Cell:
        """Check the values and return this cell.

        Raises:
            UserError: if a value is not supported, ep_size does not divide both ranks and experts, or hidden is not a
                multiple of 64.
        """
        for name, value in asdict(self).items():
            if name in CHOICES and value not in CHOICES[name]:
                raise UserError(f"{name}={value} is not supported; use one of {', '.join(map(str, CHOICES[name]))}")
            if name not in CHOICES and value < 1:
                raise UserError(f"{name}={value} is not positive; use 1 or more")
        if self.ranks % self.ep_size or self.experts % self.ep_size:
            raise UserError(
                f"ep_size={self.ep_size} must divide both ranks={self.ranks} and experts={self.experts}; use a common divisor"
            )
        if self.hidden % 64:
            raise UserError(f"hidden={self.hidden} is not a multiple of 64, the width of a head; use 64, 128, 192, ...")
        return self


CHOICES: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "dispatch": ("auto", "all_to_all", "gather"),
    "precision": ("fp32", "bf16"),
}
AXES = tuple(field.name for field in fields(Cell))
SIZES = ("experts", "lora_rank", "layers", "hidden", "seq")  # axes of the sizes of adapter, model and sequences
