"""Which rank holds which expert, as plain data, and drawing only the held slice of a bank.

Ranks of an expert-parallel group hold consecutive experts: rank q of P holds experts q L .. (q + 1) L - 1, L = E / P.

Shapes: D in-features, O out-features, E experts in all, L experts held here, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_dist.method.linear import kaiming_uniform_
from ldmole_dist.method.noise import stream


@dataclass(frozen=True)
class Placement:
    """The experts of one bank that one rank of an expert-parallel group holds.

    Args:
        num_experts: E.
        size: P, ranks in the expert-parallel group; must divide E.
        rank: of this process in the group.

    Raises:
        ValueError: where E experts cannot be spread evenly over P ranks.
    """

    num_experts: int
    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.num_experts % self.size:
            raise ValueError(
                f"num_experts={self.num_experts} cannot be spread over ep_size={self.size} ranks: "
                f"choose ep_size among {[p for p in range(1, self.num_experts + 1) if self.num_experts % p == 0]}"
            )

    @property
    def local(self) -> slice:
        """The experts held here."""
        held = self.num_experts // self.size
        return slice(self.rank * held, (self.rank + 1) * held)


def seeded(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose stream depends only on `seed` and `names`: not on process, device or order of creation."""
    return torch.Generator().manual_seed(stream(seed, *names))


def draw_bank(
    placement: Placement, rank: int, in_features: int, out_features: int, seed: int, name: str, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The held experts at their start: A Kaiming uniform, B zero, so that the adapter starts as no change.

    Expert e of module `name` has the same values under every placement.

    Args:
        placement: what is held here; nothing else is allocated.
        rank: R.
        in_features: D.
        out_features: O.
        seed: of the run.
        name: of the module.
        like: gives dtype and device.

    Returns:
        A (L, R, D) and B (L, O, R).
    """
    experts = range(placement.num_experts)[placement.local]
    A = like.new_empty(len(experts), rank, in_features)
    for local, expert in enumerate(experts):
        kaiming_uniform_(A[local], seeded(seed, name, "lora_A", expert))
    return A, like.new_zeros(len(experts), out_features, rank)
