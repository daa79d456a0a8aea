"""What one forward of the model shares with its adapted linears: token mask, auxiliary losses, recorded decisions.

One `StepContext` per model, attached at injection. `begin` opens a micro-batch, `end` closes it; in between every adapted
linear reports its routing. A checkpointed region records the decisions of its first forward on a tape and its
recomputation replays them: which experts are active, and how many rows went where, is decided once per token and layer.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ldmole_dist.method.losses import entropy_loss, l1_loss, load_balance_loss, router_z_loss, sparsity_loss
from ldmole_dist.method.noise import RouterNoise
from ldmole_dist.method.routers import Routing, lambda_or_nan

Tape = dict[Any, list[Any]]
# Is told, of every adapted linear in every forward: its name, its routing of T tokens, and which of them are real (None: all).
Observer = Callable[[str, Routing, Tensor | None], None]


@dataclass
class LossWeights:
    """Coefficients of the auxiliary losses (`losses`), and the number of experts that the sparsity loss and the L1 loss steer
    to. A loss that is not defined for a router (`Router.losses`) is not computed, whatever its coefficient; that of the L1 loss
    changes from step to step."""

    balance: float = 0.0
    sparsity: float = 0.0
    z: float = 0.0
    l1: float = 0.0
    entropy: float = 0.0
    target_k: int = 2

    def of(self, term: str) -> float:
        """The coefficient of one of `TERMS`."""
        return float(getattr(self, term))


TERMS = ("balance", "sparsity", "z", "l1", "entropy")


class StepContext:
    """State of the current micro-batch.

    Attributes:
        weights: of the auxiliary losses.
        noise: on the router scores of the next training forward; to be set for each micro-batch. None: none.
        terms: auxiliary losses of each linear that has reported, by name.
        stats: of each linear that has reported: sums of active experts and of lambda over its real tokens, and their number.
        observer: is told what is routed, in training and evaluation, once (a recomputation is not a forward). None: nobody.
    """

    def __init__(self) -> None:
        self.weights = LossWeights()
        self.noise: RouterNoise | None = None
        self.observer: Observer | None = None
        self.terms: dict[str, list[Tensor]] = {}
        self.stats: dict[str, Tensor] = {}
        self.plain = False  # while adapted linears are to do what they did without their adapter
        self.hidden: Tensor | None = None  # (B, S, H), what all routers read, if not each linear's own input
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None
        self._open = False
        self._differentiable = False
        self._region: _Region | None = None

    def begin(self, mask: Tensor | None, positions: Tensor | None = None) -> None:
        """Start a micro-batch: forget what the last one reported.

        Args:
            mask: (B, S) attention mask, nonzero for real tokens; None counts every token.
            positions: (S') those of which the model computes logits, if not of all: what an adapted head reads.
        """
        self.terms = {}
        self.stats = {}
        self._mask, self._positions = mask, positions
        self._open, self._differentiable = True, torch.is_grad_enabled()

    def end(self) -> None:
        """The forward is over; what runs now is a recomputation and reports nothing."""
        self._open = False

    def read(self, name: str, x_TD: Tensor) -> Tensor:
        """What router and lambda-MLP of an adapted linear read.

        Args:
            name: of the linear.
            x_TD: its input, T tokens.

        Returns:
            That, or (T, H) where all routers read the same hidden states.

        Raises:
            ValueError: where the linear has other rows than there are tokens.
        """
        if self.hidden is None:
            return x_TD
        hidden_TH = self.hidden.flatten(0, -2)
        if len(hidden_TH) != len(x_TD):
            raise ValueError(
                f"{name} has {len(x_TD)} rows where there are {len(hidden_TH)} tokens, so which hidden state is of which row "
                "cannot be told: leave it out of target_modules, or let routers read their layer (router_input='layer')"
            )
        return hidden_TH

    def auxiliary_loss(self) -> Tensor | float:
        """c_lb L_lb + c_sp L_sparse + ... of this micro-batch, each averaged over the adapted linears (METHOD, Losses)."""
        # One that does not count must not be part of the graph, only to be multiplied with 0.
        weighted = [(term, self.weights.of(term)) for term in self.terms]
        return sum((weight * self.mean(term) for term, weight in weighted if weight), 0.0)

    def mean(self, term: str) -> Tensor | float:
        """Mean over the adapted linears of one of `TERMS`; 0.0 if none reported."""
        values = self.terms.get(term, [])
        return torch.stack(values).mean() if values else 0.0

    def report(self, names: Sequence[str], routing: Routing, shape: torch.Size, losses: Sequence[str]) -> None:
        """The linears of an input group tell what they routed: auxiliary losses and counts are taken from it.

        The losses that count are computed in a recomputation too and thrown away there: of what a checkpointed region saved,
        its recomputation must save everything again, or the tensors cannot be matched. The other losses save nothing.

        Args:
            names: of the G linears, unique in the model.
            routing: (G, T, E), of T tokens.
            shape: the leading dimensions of the input, whose product is T.
            losses: the auxiliary losses that are defined for their router (`Router.losses`).
        """
        mask_T, weights = self._token_mask(shape), self.weights
        terms = {}
        for term in losses:
            counts = weights.of(term) > 0
            if not (counts or self._open):
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and counts):
                terms[term] = _auxiliary(term, routing, weights.target_k, mask_T)
        if not self._open:
            return
        for term, value in terms.items():
            self.terms.setdefault(term, []).extend(value.unbind())
        with torch.no_grad():
            active_GT, lam_T = (routing.p_TE != 0).sum(-1), lambda_or_nan(routing)
            real_T = torch.ones_like(lam_T, dtype=torch.bool) if mask_T is None else mask_T
            active_G = active_GT.masked_fill(~real_T, 0).sum(-1).to(lam_T.dtype)
            shared = [lam_T.masked_fill(~real_T, 0).sum(), real_T.sum().to(lam_T.dtype)]
            stats_G3 = torch.stack([active_G, *(value.expand_as(active_G) for value in shared)], dim=-1)
            self.stats.update(zip(names, stats_G3.unbind(), strict=True))

    def observe(self, name: str, routing: Routing, shape: torch.Size) -> None:
        """An adapted linear shows what it routed to the observer, if there is one.

        Args:
            name: of the linear, unique in the model.
            routing: of T tokens.
            shape: the leading dimensions of the input, whose product is T.
        """
        if self.observer is not None and self._open:
            with torch.no_grad():
                self.observer(name, routing, self._token_mask(shape))

    def _token_mask(self, shape: torch.Size) -> Tensor | None:
        if self._mask is None:
            return None
        if self._mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(self._mask.shape)}: the auxiliary losses need one value per token; "
                "pass a (batch, sequence) mask, or none if every token is real"
            )
        if self._positions is not None and shape[-1] == len(self._positions):
            return self._mask[:, self._positions].reshape(-1) != 0
        # With a key-value cache the mask also covers tokens of earlier calls; the rows of this one are its last columns.
        return self._mask[:, -shape[-1] :].reshape(-1) != 0

    def check_not_reentrant(self) -> None:
        """Raises RuntimeError where gradients are off inside a forward that began with them on."""
        if self._open and self._differentiable and not torch.is_grad_enabled():
            raise RuntimeError(
                "this forward runs inside a reentrant checkpoint, which drops the gradient of the auxiliary losses in "
                "silence; use non-reentrant checkpointing: gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For torch's `checkpoint(..., use_reentrant=False, context_fn=...)`: one tape for each checkpointed call."""
        tape: Tape = {}
        return _Region(self, tape, replaying=False), _Region(self, tape, replaying=True)

    def replayed(self, owner: Any) -> Any | None:
        """The decision that `owner` took at this point of the first forward, or None if it has to decide now."""
        region = self._region
        return region.next_decision(owner) if region is not None and region.replaying else None

    def remember(self, owner: Any, decision: Any) -> None:
        """Put a decision on the tape of the checkpointed region that is running, if one is."""
        if self._region is not None:
            self._region.tape.setdefault(owner, []).append(decision)


def _auxiliary(term: str, routing: Routing, target_k: int, mask_T: Tensor | None) -> Tensor:
    """One auxiliary loss of one adapted linear."""
    if term == "balance":
        return load_balance_loss(routing.p_TE, mask_T, routing.prob_TE)
    if term == "sparsity":
        assert routing.lam_T is not None  # defined for routers with a lambda only
        return sparsity_loss(routing.logits_TE, routing.lam_T, target_k, mask_T)
    if term == "z":
        return router_z_loss(routing.logits_TE, mask_T)
    if term == "l1":
        return l1_loss(routing.p_TE, target_k, mask_T)
    return entropy_loss(routing.logits_TE, mask_T)


class _Region(AbstractContextManager[None]):
    """A checkpointed region, either in its first forward or in its recomputation."""

    def __init__(self, context: StepContext, tape: Tape, replaying: bool) -> None:
        self.context, self.tape, self.replaying = context, tape, replaying
        self._outer: _Region | None = None
        self._position: dict[Any, int] = {}

    def __enter__(self) -> None:
        self._outer, self.context._region = self.context._region, self
        self._position = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context._region = self._outer

    def next_decision(self, owner: Any) -> Any:
        position = self._position.get(owner, 0)
        self._position[owner] = position + 1
        return self.tape[owner][position]
