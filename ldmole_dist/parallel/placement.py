"""Placement of experts on ranks, and initial values of the experts that a rank holds.

Ranks of an expert-parallel group hold consecutive experts: rank q of P holds experts q L to (q + 1) L - 1, with L = E / P.

Shapes: D in-features, O out-features, E experts in total, L experts held by this rank, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_dist.method.linear import kaiming_uniform_
from ldmole_dist.method.noise import seed_from


@dataclass(frozen=True)
class Placement:
    """The experts of one bank that one rank of an expert-parallel group holds.

    Args:
        num_experts: E.
        size: P, number of ranks in the expert-parallel group; must divide E.
        rank: rank of this process in the group.

    Raises:
        ValueError: if P does not divide E.
    """

    num_experts: int
    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.num_experts % self.size:
            divisors = [p for p in range(1, self.num_experts + 1) if self.num_experts % p == 0]
            raise ValueError(
                f"ep_size={self.size} does not divide num_experts={self.num_experts}; use one of {divisors} as ep_size"
            )

    @property
    def local(self) -> slice:
        """Indices of the experts that this rank holds, as a slice of the E experts."""
        held = self.num_experts // self.size
        return slice(self.rank * held, (self.rank + 1) * held)


def seeded(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator that depends only on `seed` and `names`, not on rank, device or creation order."""
    return torch.Generator().manual_seed(seed_from(seed, *names))


def draw_bank(
    placement: Placement,
    lora_rank: int,
    in_features: int,
    out_features: int,
    seed: int,
    name: str,
    like: Tensor,
    zero_B: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return initial values of the experts that this rank holds: A Kaiming uniform; B zero, or drawn like A.

    With B = 0, a new adapter does not change the output of the model. Each expert's A and B have their own random streams, so
    that the values do not depend on the number of ranks.

    Args:
        placement: placement of the bank, which selects the experts to allocate.
        lora_rank: R.
        in_features: D.
        out_features: O.
        seed: init_seed of the adapter.
        name: name of the adapted module, unique in the model.
        like: tensor whose dtype and device the bank gets.
        zero_B: whether B is 0; otherwise B is drawn like A.

    Returns:
        A (L, R, D) and B (L, O, R).
    """
    experts = range(placement.num_experts)[placement.local]
    A = like.new_empty(len(experts), lora_rank, in_features)
    B = like.new_zeros(len(experts), out_features, lora_rank)
    for local, expert in enumerate(experts):
        kaiming_uniform_(A[local], seeded(seed, name, "lora_A", expert))
        if not zero_B:
            kaiming_uniform_(B[local], seeded(seed, name, "lora_B", expert))
    return A, B
