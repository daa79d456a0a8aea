"""Routers: from hidden rows to routing weights, in two steps.

A router scores the experts, decides which are active, and weighs those. Deciding is apart from weighing because a recomputed
forward must replay the decision and only weigh again (see `context.StepContext`), and because the decision alone says what has
to move between ranks. Whatever the router, `p_TE != 0` gives the decided support back, on every rank and in every pass.

docs/method.md has the table of all routers with their sources and where they deviate from them.

Shapes: T tokens, D in-features, E experts, G linears of an input group. What is (T, E) below may be (G, T, E): one router
decides and weighs for all linears that read the same tensor, as one linear's many small kernels take as long as those of all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmole_dist.method.linear import kaiming_uniform_, linear
from ldmole_dist.method.sparsegen import at_least_float32, sparsegen_on_support, sparsegen_support


class Routing(NamedTuple):
    """What a router says of T tokens. `p_TE != 0` is the support: the active experts. `lam_T` is None where the router has
    no lambda. `prob_TE`: the probabilities of all experts that it chose from; None where p is all there is."""

    p_TE: Tensor
    logits_TE: Tensor
    lam_T: Tensor | None
    prob_TE: Tensor | None = None

    def by_linear(self) -> list[Routing]:
        """Of (G, T, E) the (T, E) of each linear."""
        probs = [None] * len(self.p_TE) if self.prob_TE is None else self.prob_TE.unbind()
        parts = zip(self.p_TE.unbind(), self.logits_TE.unbind(), probs, strict=True)
        return [Routing(p_TE, logits_TE, self.lam_T, prob_TE) for p_TE, logits_TE, prob_TE in parts]


def lambda_or_nan(routing: Routing) -> Tensor:
    """(T,) lambda for sums of a fixed size; no number where the router has none, so that nobody takes it for one."""
    return routing.p_TE.new_full(routing.p_TE.shape[-2:-1], torch.nan) if routing.lam_T is None else routing.lam_T


class Router(nn.Module):
    """Scores u = W_g x; subclasses decide and weigh.

    Args:
        in_features: D.
        num_experts: E.

    Attributes:
        needs_lambda: whether it reads the lambda of a token.
        losses: the auxiliary losses that are defined for it (names of `context.LossWeights`).

    The weight is left uninitialised; `reset` fills it.
    """

    needs_lambda = False
    losses: tuple[str, ...] = ("balance", "z")

    def __init__(self, in_features: int, num_experts: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device))

    def reset(self, generator: torch.Generator) -> None:
        """Kaiming uniform with a = sqrt 5, as the authors' nn.Linear."""
        kaiming_uniform_(self.weight, generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores (T, E) in at least float32, whatever the dtype of x: a rounded score is another choice of experts."""
        return linear(x_TD, self.weight, None, at_least_float32(x_TD.dtype))

    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """The support (T, E), bool; a score that is no number is in it, so that it is not hidden."""
        raise NotImplementedError

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """The weights on a given support."""
        raise NotImplementedError


class SparsegenRouter(Router):
    """Sparsegen over the scores: the paper's router."""

    needs_lambda = True
    losses = ("balance", "sparsity", "z")

    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        assert lam_T is not None
        return sparsegen_support(logits_TE, lam_T.expand(logits_TE.shape[:-1]))

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        assert lam_T is not None
        p_TE = sparsegen_on_support(logits_TE, lam_T.expand(logits_TE.shape[:-1]), support_TE)
        return Routing(p_TE, logits_TE, lam_T)


class SoftmaxRouter(Router):
    """Every expert is active: p = softmax(u) (the first mixtures of LoRA experts)."""

    @torch.no_grad()
    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        return torch.ones_like(logits_TE, dtype=torch.bool)

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        return Routing(_kept(logits_TE.softmax(-1), support_TE), logits_TE, None)


class TopKRouter(Router):
    """The k largest scores are active, of equal ones the first: p = softmax over them (MoLA, arXiv 2402.08562).

    Args:
        in_features: D.
        num_experts: E.
        top_k: k, at most E.
    """

    def __init__(self, in_features: int, num_experts: int, top_k: int, device: torch.device | None = None) -> None:
        super().__init__(in_features, num_experts, device)
        self.top_k = top_k

    @torch.no_grad()
    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        # Not topk: which of equal scores it takes depends on the device.
        chosen = logits_TE.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        return torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, chosen, True)  # a NaN is the largest

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        p_TE = logits_TE.masked_fill(~support_TE, -torch.inf).softmax(-1)
        return Routing(_kept(p_TE, support_TE), logits_TE, None, logits_TE.softmax(-1))


class TopPRouter(Router):
    """The fewest experts whose softmax mass reaches a threshold are active: p = softmax(u) on them, not normalised again
    (Huang et al. 2024, "Harder Tasks Need More Experts", arXiv 2403.07652). Its entropy loss keeps the softmax from going flat.

    Args:
        in_features: D.
        num_experts: E.
        top_p: the threshold, in (0, 1].
    """

    losses = ("balance", "z", "entropy")

    def __init__(self, in_features: int, num_experts: int, top_p: float, device: torch.device | None = None) -> None:
        super().__init__(in_features, num_experts, device)
        self.top_p = top_p

    @torch.no_grad()
    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        sorted_TE, order_TE = logits_TE.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before_TE = F.pad(sorted_TE.cumsum(-1)[..., :-1], (1, 0))
        # An expert belongs to it if those before it are not enough; ~(>=) and not <: a NaN makes the whole row active.
        return torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, order_TE, ~(before_TE >= self.top_p))

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        prob_TE = logits_TE.softmax(-1)
        return Routing(_kept(prob_TE, support_TE), logits_TE, None, prob_TE)


class ReluRouter(Router):
    """Experts with a positive score are active, perhaps none: p = relu(u) (ReMoE, arXiv 2412.14711; ReMoLE in the paper). How
    many there are is steered by an L1 loss whose coefficient adapts (`losses.l1_loss`)."""

    losses = ("l1", "z")

    @torch.no_grad()
    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        return ~(logits_TE <= 0)  # a NaN is active

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        return Routing(_kept(logits_TE, support_TE), logits_TE, None)


class LoraRouter(Router):
    """No routing: every expert is active with weight 1, so that E experts of rank r are one LoRA of rank E r, with the scaling
    lora_alpha / r. It has no parameters."""

    losses = ()

    def __init__(self, in_features: int, num_experts: int, device: torch.device | None = None) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def reset(self, generator: torch.Generator) -> None:
        """Nothing is drawn."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, E) ones."""
        return x_TD.new_ones(len(x_TD), self.num_experts, dtype=at_least_float32(x_TD.dtype))

    @torch.no_grad()
    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        return torch.ones_like(logits_TE, dtype=torch.bool)

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        return Routing(support_TE.to(logits_TE.dtype), logits_TE, None)


ROUTERS: dict[str, type[Router]] = {
    "sparsegen": SparsegenRouter,
    "topk": TopKRouter,
    "relu": ReluRouter,
    "softmax": SoftmaxRouter,
    "top_p": TopPRouter,
    "lora": LoraRouter,
}


def new_router(name: str, in_features: int, num_experts: int, *, top_k: int, top_p: float) -> Router:
    """A router by its name in `ROUTERS`; of the options it takes its own.

    Args:
        name: of the router.
        in_features: D.
        num_experts: E.
        top_k: of "topk".
        top_p: of "top_p".
    """
    if name == "topk":
        return TopKRouter(in_features, num_experts, top_k)
    if name == "top_p":
        return TopPRouter(in_features, num_experts, top_p)
    return ROUTERS[name](in_features, num_experts)


def _kept(p_TE: Tensor, support_TE: Tensor) -> Tensor:
    """The weights of the support. One that rounds to 0 there becomes the smallest number: the weight says who is active."""
    return p_TE.clamp_min(torch.finfo(p_TE.dtype).tiny).masked_fill(~support_TE, 0)
