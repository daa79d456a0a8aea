"""The lambda-MLP, which predicts the sparsity lambda of each token (paper, section 3).

Shapes: T tokens, D in-features, H hidden units.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmole_dist.method.linear import InputDtypeLinear, kaiming_uniform_
from ldmole_dist.method.sparsegen import at_least_float32

AUTHORS_BIAS = -2.5  # of all biases in the authors' code; lambda then starts at logsigmoid(-2.5) + 0.99 = -1.59


class LambdaMLP(nn.Module):
    """Predicts lambda = logsigmoid(W_2 relu(W_1 x + b_1) + b_2) + 1 - eps, so that lambda < 1 - eps.

    All linears of an adapter whose routers read inputs of the same size share one MLP. In the paper's ablation, a shared MLP is
    better than one per layer.
    Parameters are uninitialized until `reset` is called.

    Args:
        in_features: D.
        hidden: H; 256 in the paper, 512 in the authors' Qwen3-0.6B script.
        eps: distance of lambda's upper bound from 1.
        device: device of the parameters.
    """

    def __init__(self, in_features: int, hidden: int, eps: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.fc1 = InputDtypeLinear(in_features, hidden, device=device)
        self.fc2 = InputDtypeLinear(hidden, 1, device=device)

    def reset(self, generator: torch.Generator, init: str) -> None:
        """Initialize the parameters in place.

        Args:
            generator: CPU generator.
            init: "authors" sets every bias to -2.5. For inputs of unit scale nearly all hidden units are then dead, and
                lambda starts as the constant -1.59 (if eps = 0.01). "live" sets hidden biases to 0, draws the output
                weights from a range sqrt(6) times as wide and subtracts their mean, so that about half of the units are
                active and lambda starts spread around the same mean.
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
        """Return lambda, (T,) in at least float32."""
        # The first product is most of the cost and runs in the dtype of x; everything after it in at least float32.
        hidden_TH = F.relu(self.fc1(x_TD))
        score_T = self.fc2(hidden_TH.to(at_least_float32(x_TD.dtype))).squeeze(-1)
        return F.logsigmoid(score_T) + (1 - self.eps)
