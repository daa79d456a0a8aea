"""The lambda-MLP: how sparse the routing of a token is to be; one for all linears with the same number of in-features.

Shapes: T tokens, D in-features, H hidden units.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmole_dist.method.linear import PromotingLinear, kaiming_uniform_
from ldmole_dist.method.sparsegen import at_least_float32

AUTHORS_BIAS = -2.5  # every bias of the authors' lambda-MLP; logsigmoid(-2.5) + 0.99 = -1.59


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
