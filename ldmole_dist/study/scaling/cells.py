"""What is measured: a cell is one configuration, a grid varies one axis of a base cell at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from ldmole_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig

VOCABULARY = 4096
ANSWERS = 8  # tokens at the end of each sequence that the loss is on
LAMBDA_HIDDEN = 256


@dataclass(frozen=True)
class Cell:
    """One configuration.

    Args:
        ranks: processes, one for each GPU or sharing the CPU's cores.
        ep_size: consecutive ranks that hold one copy of all experts between them.
        stage: of ZeRO.
        dispatch: "auto", "all_to_all" or "gather"; without meaning where ep_size is 1.
        experts: of every linear.
        lora_rank: of an expert.
        hidden: width of the Llama; a multiple of 64, the width of a head.
        layers: its depth.
        micro_batch: sequences of a rank and forward.
        accumulation: micro-batches of an optimizer step.
        seq: tokens of a sequence.
        precision: "fp32" or "bf16".
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
    def tokens_per_rank(self) -> int:
        """Of an optimizer step."""
        return self.micro_batch * self.accumulation * self.seq

    @property
    def tokens(self) -> int:
        """Of an optimizer step, all ranks together."""
        return self.ranks * self.tokens_per_rank

    def backbone(self) -> LlamaConfig:
        """The Llama of this cell, in the proportions of the small Llamas."""
        from transformers import LlamaConfig  # slow to import: only where a model is made

        heads = self.hidden // 64
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 8 // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            head_dim=64,
            max_position_embeddings=max(2048, self.seq),
        )

    def checked(self) -> Cell:
        """This cell.

        Raises:
            UserError: where it cannot run, naming the value.
        """
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}={getattr(self, name)} is not known: choose from {', '.join(map(str, allowed))}"
                )
        for name, value in asdict(self).items():
            if name not in CHOICES and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.ranks % self.ep_size or self.experts % self.ep_size:
            raise UserError(f"ep_size={self.ep_size} must divide ranks={self.ranks} and experts={self.experts}")
        if self.hidden % 64:
            raise UserError(f"hidden={self.hidden} must be a multiple of 64, the width of an attention head")
        return self


CHOICES: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "dispatch": ("auto", "all_to_all", "gather"),
    "precision": ("fp32", "bf16"),
}
AXES = tuple(field.name for field in fields(Cell))
