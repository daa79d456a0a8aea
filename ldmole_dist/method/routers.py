"""From hidden rows to routing weights: the router of one linear and the lambda-MLP that many linears share.

A router decides which experts are active and weighs them, in two steps, because a recomputed forward must replay the
decision and only weigh again (see `context.StepContext`).

Shapes: T tokens, D in-features, E experts, H hidden units of the lambda-MLP.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldmole_dist.method.sparsegen import at_least_float32, sparsegen_on_support, sparsegen_support

AUTHORS_BIAS = -2.5  # every bias of the authors' lambda-MLP; logsigmoid(-2.5) + 0.99 = -1.59


class Routing(NamedTuple):
    """What one router says of T tokens. `p_TE != 0` is the support: the active experts."""

    p_TE: Tensor
    logits_TE: Tensor
    lam_T: Tensor


class SparsegenRouter(nn.Module):
    """Scores u = W_g x and Sparsegen over them (the paper's router).

    Args:
        in_features: D.
        num_experts: E.

    The weight is left uninitialised; `reset` fills it.
    """

    def __init__(self, in_features: int, num_experts: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device))

    def reset(self, generator: torch.Generator) -> None:
        """Kaiming uniform with a = sqrt 5, as the authors' nn.Linear."""
        kaiming_uniform_(self.weight, generator)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores (T, E) in at least float32, whatever the dtype of x: a rounded score is another choice of experts."""
        return linear(x_TD, self.weight, None, at_least_float32(x_TD.dtype))

    def decide(self, logits_TE: Tensor, lam_T: Tensor) -> Tensor:
        """The support (T, E), bool."""
        return sparsegen_support(logits_TE, lam_T)

    def weigh(self, logits_TE: Tensor, lam_T: Tensor, support_TE: Tensor) -> Routing:
        """The weights on a given support."""
        return Routing(sparsegen_on_support(logits_TE, lam_T, support_TE), logits_TE, lam_T)


ROUTERS: dict[str, type[SparsegenRouter]] = {"sparsegen": SparsegenRouter}


class LambdaMLP(nn.Module):
    """lambda = logsigmoid(W_2 relu(W_1 x + b_1) + b_2) + 1 - eps, so lambda < 1 - eps; one for all linears of one D.

    Args:
        in_features: D.
        hidden: H; 256 in the paper, 512 in the authors' Qwen3-0.6B script.
        eps: how far below 1 lambda stays.

    Parameters are left uninitialised; `reset` fills them.
    """

    def __init__(self, in_features: int, hidden: int, eps: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.fc1 = PromotingLinear(in_features, hidden, device=device)
        self.fc2 = PromotingLinear(hidden, 1, device=device)

    def reset(self, generator: torch.Generator, init: str) -> None:
        """Initialise in place.

        Args:
            init: "authors": every bias -2.5, which leaves nearly all hidden units dead for inputs of unit scale, so that
                lambda starts as the constant -1.59; "live": biases of the hidden units 0 and output weights of mean 0, so
                that about half of the units fire and lambda starts spread around that same mean.
        """
        kaiming_uniform_(self.fc1.weight, generator)
        with torch.no_grad():
            if init == "authors":
                kaiming_uniform_(self.fc2.weight, generator)
                self.fc1.bias.fill_(AUTHORS_BIAS)
            else:
                bound = math.sqrt(6 / self.fc2.in_features)
                self.fc2.weight.copy_(torch.empty(self.fc2.weight.shape).uniform_(-bound, bound, generator=generator))
                self.fc2.weight.sub_(self.fc2.weight.mean())
                self.fc1.bias.zero_()
            self.fc2.bias.fill_(AUTHORS_BIAS)

    def forward(self, x_TD: Tensor) -> Tensor:
        """lambda (T,) in at least float32. The wide first product runs in the dtype of x, all that follows above it."""
        hidden_TH = F.relu(self.fc1(x_TD))
        score_T = self.fc2(hidden_TH.to(at_least_float32(x_TD.dtype))).squeeze(-1)
        return F.logsigmoid(score_T) + (1 - self.eps)


class PromotingLinear(nn.Linear):
    """nn.Linear that computes in the dtype of its input, whatever the dtype its weights are kept in."""

    def __init__(self, in_features: int, out_features: int, device: torch.device | None = None) -> None:
        super().__init__(in_features, out_features, device=device)

    def reset_parameters(self) -> None:
        """Nothing: the owner initialises from a generator of its own, the global one is not advanced."""

    def forward(self, input: Tensor) -> Tensor:
        """(T, in) -> (T, out)."""
        return linear(input, self.weight, self.bias, input.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + b computed in `dtype`, keeping only x and W themselves for the backward and no casted copies.

    Args:
        x: (T, D), any floating dtype; its gradient has the same.
        weight: (O, D), any floating dtype; its gradient has the same.
        bias: (O,) or None.
        dtype: of the product and of the result.

    Returns:
        (T, O) in `dtype`.
    """
    return _Linear.apply(x, weight, bias, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


@torch.no_grad()
def kaiming_uniform_(weight: Tensor, generator: torch.Generator) -> None:
    """Fill (..., fan_in) with U(-1/sqrt fan_in, 1/sqrt fan_in): torch's Kaiming uniform with a = sqrt 5, drawn on the CPU
    so that every device and every rank gets the same values from the same generator."""
    bound = 1 / math.sqrt(weight.shape[-1])
    weight.copy_(torch.empty(weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
