"""State that one forward of the model shares with its adapted linears: token mask, auxiliary losses, recorded decisions.

There is one `StepContext` per model, attached at injection. `begin` opens a micro-batch and `end` closes it; in between,
adapted linears in training mode record their auxiliary losses and statistics. The first forward of a checkpointed region
records its decisions on a tape, and the recomputation replays them: which experts are active, and which rows and experts are
sent to each rank. A recomputation that decided again could round differently, and its rows would not match the split sizes of
the all-to-all.

Shapes: B sequences, S positions, T tokens, D in-features, H backbone hidden size, E experts, G linears of an input group.
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

# Recorded decisions of each owner (the leader of an input group), in the order of its calls.
Tape = dict[Any, list[Any]]
# Called once per adapted linear and forward. Arguments: name of the linear, its routing of T tokens, and the (T,) mask of real
# tokens, None if all are real.
Observer = Callable[[str, Routing, Tensor | None], None]


@dataclass
class LossWeights:
    """Coefficients of the auxiliary losses (see `losses`).

    A loss that is not defined for the router (`Router.losses`) is not computed, whatever its coefficient.

    Attributes:
        balance: coefficient of the load-balancing loss; c_lb in the paper.
        sparsity: coefficient of the sparsity loss; c_sp in the paper.
        z: coefficient of the router z-loss.
        l1: coefficient of the ReLU router's L1 loss; `ldmole train` adapts it after each step (`losses.next_l1_coefficient`).
        entropy: coefficient of the top-p router's entropy loss.
        target_k: target number of active experts per token, for the sparsity loss and the L1 loss.
    """

    balance: float = 0.0
    sparsity: float = 0.0
    z: float = 0.0
    l1: float = 0.0
    entropy: float = 0.0
    target_k: int = 2

    def of(self, term: str) -> float:
        """Return the coefficient of the loss `term`, one of `TERMS`."""
        return float(getattr(self, term))


# Names of the auxiliary losses: the coefficients in `LossWeights` and the keys of `StepContext.terms`.
TERMS = ("balance", "sparsity", "z", "l1", "entropy")


class StepContext:
    """State of the current micro-batch; one object per model, shared by its adapted linears.

    Attributes:
        weights: coefficients of the auxiliary losses.
        noise: noise on the router scores of the next training forward; set it for each micro-batch. None: no noise.
        observer: function that gets the routing of each linear in training and evaluation, but not in a recomputation; or None.
        terms: values of each auxiliary loss, one scalar per linear recorded so far; keyed by the name of the loss.
        stats: (3,) per linear, keyed by its name: over its real tokens, the number of active (token, expert) pairs, the sum of
            lambda (NaN for routers without lambda) and the number of tokens.
        adapter_disabled: whether adapted linears return only their base output.
        hidden: (B, S, H) hidden states that all routers read instead of their linear's input (router_input='hidden'), or None.
    """

    def __init__(self) -> None:
        self.weights = LossWeights()
        self.noise: RouterNoise | None = None
        self.observer: Observer | None = None
        self.terms: dict[str, list[Tensor]] = {}
        self.stats: dict[str, Tensor] = {}
        self.adapter_disabled = False
        self.hidden: Tensor | None = None
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None
        self._open = False
        self._differentiable = False
        self._region: _Region | None = None

    def begin(self, mask: Tensor | None, positions: Tensor | None = None) -> None:
        """Start a micro-batch and clear the records of the previous one.

        Args:
            mask: (B, S) attention mask, nonzero for real tokens; None counts every token.
            positions: 1-D, the sequence positions that the model computes logits for, the only ones that an adapted head
                reads; None for all positions.
        """
        self.terms = {}
        self.stats = {}
        self._mask, self._positions = mask, positions
        self._open, self._differentiable = True, torch.is_grad_enabled()

    def end(self) -> None:
        """End the forward. Later calls of adapted linears are recomputations and record nothing."""
        self._open = False

    def router_input(self, name: str, x_TD: Tensor) -> Tensor:
        """Return the input of the router and the lambda-MLP of an adapted linear.

        Args:
            name: name of the linear.
            x_TD: input of the linear, after dropout.

        Returns:
            x_TD, or, if `hidden` is set, the hidden states as (T, H).

        Raises:
            ValueError: if the number of hidden states is not the number of rows of x_TD.
        """
        if self.hidden is None:
            return x_TD
        hidden_TH = self.hidden.flatten(0, -2)
        if len(hidden_TH) != len(x_TD):
            raise ValueError(
                f"{name} reads {len(x_TD)} rows, but router_input='hidden' gives its router {len(hidden_TH)} hidden states; "
                "remove this linear from target_modules, or set router_input='layer'"
            )
        return hidden_TH

    def auxiliary_loss(self) -> Tensor | float:
        """Return the weighted sum c_lb L_lb + c_sp L_sparse + ... of the auxiliary losses of this micro-batch.

        Each loss is averaged over the adapted linears. The sum is 0.0 if no recorded loss has a nonzero coefficient.
        """
        # Skip terms with a zero coefficient, so that they never enter the graph and cannot turn the loss into NaN.
        weighted = [(term, self.weights.of(term)) for term in self.terms]
        return sum((weight * self.mean(term) for term, weight in weighted if weight), 0.0)

    def mean(self, term: str) -> Tensor | float:
        """Return the auxiliary loss `term`, averaged over the adapted linears; 0.0 if no linear recorded it."""
        values = self.terms.get(term, [])
        return torch.stack(values).mean() if values else 0.0

    def record_routing(self, names: Sequence[str], routing: Routing, shape: torch.Size, losses: Sequence[str]) -> None:
        """Record the auxiliary losses and statistics of the linears of an input group.

        A loss with a nonzero coefficient is also computed in a recomputation, where its value is dropped: torch's checkpoint
        requires that the recomputation saves the same tensors as the first forward. A loss whose coefficient is 0 is computed
        only in the first forward, without a graph.

        Args:
            names: names of the G linears, unique in the model.
            routing: routing of the G linears, (G, T, E).
            shape: leading dimensions of the input, whose product is T.
            losses: names of the losses that are defined for the router (`Router.losses`).
        """
        mask_T, weights = self._token_mask(shape), self.weights
        terms = {}
        for term in losses:
            differentiable = weights.of(term) > 0
            if not (differentiable or self._open):
                continue
            with torch.set_grad_enabled(torch.is_grad_enabled() and differentiable):
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
        """Call the observer, if there is one, with the routing of a linear.

        Args:
            name: name of the linear, unique in the model.
            routing: routing of the linear, (T, E).
            shape: leading dimensions of the input, whose product is T.
        """
        if self.observer is not None and self._open:
            with torch.no_grad():
                self.observer(name, routing, self._token_mask(shape))

    def _token_mask(self, shape: torch.Size) -> Tensor | None:
        if self._mask is None:
            return None
        if self._mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(self._mask.shape)}, but the auxiliary losses and routing "
                "statistics need one value per token; pass a (batch, sequence) mask, or None if every token is real"
            )
        if self._positions is not None and shape[-1] == len(self._positions):
            return self._mask[:, self._positions].reshape(-1) != 0
        # With a key-value cache the mask also covers tokens of earlier calls; this call's tokens are its last columns.
        return self._mask[:, -shape[-1] :].reshape(-1) != 0

    def check_not_reentrant(self) -> None:
        """Raise RuntimeError if this forward runs inside a reentrant checkpoint.

        Such a checkpoint is recognized by its disabled gradients in a forward that started with gradients enabled.
        """
        if self._open and self._differentiable and not torch.is_grad_enabled():
            raise RuntimeError(
                "reentrant checkpointing silently drops the gradients of the auxiliary losses; use non-reentrant "
                "checkpointing: gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of forward and recomputation for `checkpoint(..., use_reentrant=False, context_fn=...)`.

        Each call creates a new tape, so that each checkpointed call replays its own decisions.
        """
        tape: Tape = {}
        return _Region(self, tape, replaying=False), _Region(self, tape, replaying=True)

    def replay_decision(self, owner: Any) -> Any | None:
        """Return the decision that `owner` recorded at this point of the first forward; None outside a recomputation."""
        region = self._region
        return region.next_decision(owner) if region is not None and region.replaying else None

    def record_decision(self, owner: Any, decision: Any) -> None:
        """Record a decision on the tape of the checkpointed region that is running, if any."""
        if self._region is not None:
            self._region.tape.setdefault(owner, []).append(decision)


def _auxiliary(term: str, routing: Routing, target_k: int, mask_T: Tensor | None) -> Tensor:
    """Return the auxiliary loss `term` of each linear of an input group, (G,)."""
    if term == "balance":
        return load_balance_loss(routing.p_TE, mask_T, routing.prob_TE)
    if term == "sparsity":
        assert routing.lam_T is not None  # the sparsity loss is defined only for routers with lambda
        return sparsity_loss(routing.logits_TE, routing.lam_T, target_k, mask_T)
    if term == "z":
        return router_z_loss(routing.logits_TE, mask_T)
    if term == "l1":
        return l1_loss(routing.p_TE, target_k, mask_T)
    return entropy_loss(routing.logits_TE, mask_T)


class _Region(AbstractContextManager[None]):
    """A checkpointed region, in its first forward or its recomputation. Regions may be nested."""

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
