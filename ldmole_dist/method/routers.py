"""Routers: from hidden states to routing weights.

A router scores the experts; then `decide` selects the active ones and `weigh` returns their weights. The last two steps are
separate because a recomputed forward must replay the decision and compute only the weights again (see `context.StepContext`),
and because the decision alone determines what ranks have to exchange. For every router, `p_TE != 0` recovers the support that
`decide` returned, in the first forward as in a recomputed one.

docs/method.md lists all routers with their sources and the deviations from them.

Shapes: T tokens, D in-features, E experts, G linears of an input group. (T, E) below may also be (G, T, E): one router decides
and weighs for all linears of a group, as the small kernels take as long for one linear as for all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmole_dist.method.linear import kaiming_uniform_, linear
from ldmole_dist.method.sparsegen import at_least_float32, sparsegen_on_support, sparsegen_support


class Routing(NamedTuple):
    """Routing of T tokens.

    Attributes:
        p_TE: routing weights; `p_TE != 0` is the support, the active experts.
        logits_TE: router scores u.
        lam_T: sparsity lambda; None if the router has none.
        prob_TE: probabilities of all experts before the selection, for the load-balancing loss; None if that loss uses p_TE.
    """

    p_TE: Tensor
    logits_TE: Tensor
    lam_T: Tensor | None
    prob_TE: Tensor | None = None

    def by_linear(self) -> list[Routing]:
        """Split the routing of a group, (G, T, E), into the routing of each linear, (T, E)."""
        probs = [None] * len(self.p_TE) if self.prob_TE is None else self.prob_TE.unbind()
        parts = zip(self.p_TE.unbind(), self.logits_TE.unbind(), probs, strict=True)
        return [Routing(p_TE, logits_TE, self.lam_T, prob_TE) for p_TE, logits_TE, prob_TE in parts]


def lambda_or_nan(routing: Routing) -> Tensor:
    """Return lambda, (T,); NaN for routers without lambda, so that statistics have the same size for every router."""
    return routing.p_TE.new_full(routing.p_TE.shape[-2:-1], torch.nan) if routing.lam_T is None else routing.lam_T


class Router(nn.Module):
    """Base class: linear scores u = W_g x. Subclasses implement `decide` and `weigh`.

    The weight is uninitialized until `reset` is called.

    Args:
        in_features: D.
        num_experts: E.
        device: device of the weight.

    Attributes:
        needs_lambda: whether the router uses lambda.
        losses: names of the auxiliary losses that are defined for the router (fields of `context.LossWeights`).
    """

    needs_lambda = False
    losses: tuple[str, ...] = ("balance", "z")

    def __init__(self, in_features: int, num_experts: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device))

    def reset(self, generator: torch.Generator) -> None:
        """Initialize the weight like nn.Linear, which the authors use: Kaiming uniform with a = sqrt(5)."""
        kaiming_uniform_(self.weight, generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the scores, (T, E) in at least float32.

        Rounding the scores to half precision could change which experts are active.
        """
        return linear(x_TD, self.weight, None, at_least_float32(x_TD.dtype))

    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """Return the support, (T, E) bool. If a token has NaN scores, its support has one, so that NaN reaches the output."""
        raise NotImplementedError

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """Return the routing with weights on the given support."""
        raise NotImplementedError


class SparsegenRouter(Router):
    """The paper's router: p = Sparsegen(u, lambda) (section 3)."""

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
    """Dense routing, p = softmax(u); every expert is active."""

    @torch.no_grad()
    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        return torch.ones_like(logits_TE, dtype=torch.bool)

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        return Routing(_on_support(logits_TE.softmax(-1), support_TE), logits_TE, None)


class TopKRouter(Router):
    """The k experts with the largest scores are active; p = softmax over these scores. Ties go to the lower index.

    Source: MoLA, arXiv 2402.08562.

    Args:
        in_features: D.
        num_experts: E.
        top_k: k, at most E.
        device: device of the weight.
    """

    def __init__(self, in_features: int, num_experts: int, top_k: int, device: torch.device | None = None) -> None:
        super().__init__(in_features, num_experts, device)
        self.top_k = top_k

    @torch.no_grad()
    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        # torch.topk breaks ties differently on different devices; a stable sort does not.
        chosen = logits_TE.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        return torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, chosen, True)  # sort puts NaN first

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        p_TE = logits_TE.masked_fill(~support_TE, -torch.inf).softmax(-1)
        return Routing(_on_support(p_TE, support_TE), logits_TE, None, logits_TE.softmax(-1))


class TopPRouter(Router):
    """The smallest set of experts whose probabilities softmax(u) sum to at least `top_p` is active; p = softmax(u) on this set.

    The weights are not renormalized to sum to 1. The entropy loss keeps the softmax from becoming flat, because a flat softmax
    activates the most experts. Source: Huang et al. 2024, "Harder Tasks Need More Experts", arXiv 2403.07652.

    Args:
        in_features: D.
        num_experts: E.
        top_p: threshold on the cumulative probability, in (0, 1].
        device: device of the weight.
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
        # An expert is active if the sum over the experts before it is below top_p. ~(>=) instead of <, so that NaN is active.
        return torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(-1, order_TE, ~(before_TE >= self.top_p))

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        prob_TE = logits_TE.softmax(-1)
        return Routing(_on_support(prob_TE, support_TE), logits_TE, None, prob_TE)


class ReluRouter(Router):
    """Experts with a positive score are active, with weights p = relu(u). A token may have no active expert.

    An L1 loss with an adaptive coefficient steers the number of active experts (`losses.l1_loss`). Source: ReMoE, arXiv
    2412.14711; ReMoLE in the LD-MoLE paper.
    """

    losses = ("l1", "z")

    @torch.no_grad()
    def decide(self, logits_TE: Tensor, lam_T: Tensor | None) -> Tensor:
        """See `Router`."""
        return ~(logits_TE <= 0)  # not (> 0), so that NaN is active

    def weigh(self, logits_TE: Tensor, lam_T: Tensor | None, support_TE: Tensor) -> Routing:
        """See `Router`."""
        return Routing(_on_support(logits_TE, support_TE), logits_TE, None)


class LoraRouter(Router):
    """No routing and no parameters: every expert is active with weight 1.

    E experts of LoRA rank r then equal one LoRA of rank E r with the scaling lora_alpha / r: the baseline without a mixture.
    """

    losses = ()

    def __init__(self, in_features: int, num_experts: int, device: torch.device | None = None) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def reset(self, generator: torch.Generator) -> None:
        """Do nothing: there are no parameters."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return scores of 1, (T, E)."""
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
    """Create a router by name. Options of other routers are ignored.

    Args:
        name: key of `ROUTERS`.
        in_features: D.
        num_experts: E.
        top_k: number of active experts per token, for "topk".
        top_p: threshold on the cumulative probability, for "top_p".
    """
    if name == "topk":
        return TopKRouter(in_features, num_experts, top_k)
    if name == "top_p":
        return TopPRouter(in_features, num_experts, top_p)
    return ROUTERS[name](in_features, num_experts)


def _on_support(p_TE: Tensor, support_TE: Tensor) -> Tensor:
    """Return the weights with 0 off the support, and at least the smallest normal number on it.

    A softmax can underflow to 0 on the support, and a ReLU score can round to 0 or less when a recomputation replays the
    support, but `p != 0` must recover the support.
    """
    return p_TE.clamp_min(torch.finfo(p_TE.dtype).tiny).masked_fill(~support_TE, 0)
