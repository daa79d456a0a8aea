"""State of one forward that all adapted linears of a model share: token masks, auxiliary losses, recorded decisions.

There is one `StepContext` per model, attached at injection. `begin` opens a forward and `end` closes it; in between, adapted
linears in training mode record their auxiliary losses and statistics if gradients are enabled. The first forward of a
checkpointed region records its decisions on a tape, and the recomputation replays them: which experts are active, and which
rows and experts are sent to each rank. A recomputation that decided again could round differently, and its rows would not
match the split sizes of the all-to-all.

Shapes: B sequences, S positions, T tokens, D in-features, H backbone hidden size, E experts, G linears of an input group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ldmole_dist.method.losses import entropy_loss, l1_loss, load_balance_loss, router_z_loss, sparsity_loss
from ldmole_dist.method.noise import RouterNoise
from ldmole_dist.method.routers import Routing, lambda_or_nan

# Recorded decisions by owner, in the order of the owner's calls. The owner is the linear that computes: the leader of an input
# group or, if another linear of the group gets a different input, that linear.
Tape = dict[Any, list[Any]]
# Called with each routing of an adapted linear, except in recomputations. Arguments: name of the linear, its routing of T
# tokens, and the (T,) mask of real tokens, None if every token counts.
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


# Name of the mask that covers the rows of a linear's input. In place of a name, None says that no mask is known to cover the
# rows, for example because the rows are image patches, or one row for each sequence; then every row counts.
MaskName = Literal["attention_mask", "decoder_attention_mask"]


class _Inputs(NamedTuple):
    """Inputs of a forward that adapted linears use: those of `StepContext.begin`.

    A checkpointed region keeps them for its recomputation.
    """

    masks: dict[MaskName, Tensor | None]
    positions: Tensor | None
    hidden: Tensor | None


# The attributes of a StepContext that belong to one forward.
RECORDS = ("terms", "stats", "_inputs", "_open", "_differentiable", "_region")


class StepContext:
    """State of the current micro-batch; one object per model, shared by its adapted linears.

    Attributes:
        weights: coefficients of the auxiliary losses.
        noise: noise on the router scores of linears in training mode; set it for each micro-batch. None: no noise.
        observer: function that gets the routing of each linear in training and evaluation, but not in a recomputation; or None.
        terms: values of each auxiliary loss, one scalar per linear recorded so far; keyed by the name of the loss.
        stats: (3,) per linear, keyed by its name: over the real tokens of its last call, the number of active (token, expert)
            pairs, the sum of lambda (NaN for routers without lambda) and the number of tokens.
        adapter_disabled: whether adapted linears return only their base output.
    """

    def __init__(self) -> None:
        self.weights = LossWeights()
        self.noise: RouterNoise | None = None
        self.observer: Observer | None = None
        self.terms: dict[str, list[Tensor]] = {}
        self.stats: dict[str, Tensor] = {}
        self.adapter_disabled = False
        # Kept after `end`, for recomputations that do not use `checkpoint_contexts`.
        self._inputs = _Inputs({"attention_mask": None, "decoder_attention_mask": None}, None, None)
        self._open = False
        self._differentiable = False
        self._region: _Region | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model starts without the records of the last forward: deepcopy raises on tensors of an autograd graph.
        return vars(self) | {name: value for name, value in vars(StepContext()).items() if name in RECORDS}

    def begin(
        self,
        mask: Tensor | None,
        positions: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        """Start a forward and, if gradients are enabled, clear the records of the previous forward.

        A forward without gradients, such as that of a reference model, records nothing and keeps the records as they are.

        Args:
            mask: (B, S) attention mask, nonzero for real tokens; None counts every token. That of the encoder if the model has
                an encoder and a decoder.
            positions: 1-D, the sequence positions that the model computes logits for, the only ones that an adapted head
                reads; None for all positions.
            decoder_mask: (B, S) attention mask of the decoder's tokens in a model with an encoder and a decoder.
            hidden: (B, S, H) hidden states that all routers read instead of their linear's input (router_input='hidden').
        """
        self._open, self._differentiable = True, torch.is_grad_enabled()
        if self._differentiable:
            self.terms, self.stats = {}, {}
        self._inputs = _Inputs({"attention_mask": mask, "decoder_attention_mask": decoder_mask}, positions, hidden)

    def end(self) -> None:
        """End the forward. Until the next `begin`, calls count as recomputations, which record no losses and statistics."""
        self._open = False

    def router_input(self, name: str, x_TD: Tensor) -> Tensor:
        """Return the input of the router and the lambda-MLP of an adapted linear.

        Args:
            name: name of the linear.
            x_TD: input of the linear, after dropout.

        Returns:
            x_TD, or, if the forward has `hidden` states, these as (T, H).

        Raises:
            ValueError: if the number of hidden states is not the number of rows of x_TD.
        """
        hidden = self._inputs.hidden
        if hidden is None:
            return x_TD
        hidden_TH = hidden.flatten(0, -2)
        if len(hidden_TH) != len(x_TD):
            raise ValueError(
                f"{name} reads {len(x_TD)} rows, but router_input='hidden' gives its router {len(hidden_TH)} hidden states; "
                "remove this linear from target_modules, or set router_input='layer'"
            )
        return hidden_TH

    def token_mask(self, name: MaskName | None, shape: torch.Size) -> Tensor | None:
        """Return which rows of a linear's input are real tokens.

        Args:
            name: mask that covers the rows of the linear; None if no mask does.
            shape: leading dimensions of the linear's input, with product T; (T,) if the input has several rows per token.

        Returns:
            (T,) bool; None if every row counts: `name` is None, the model got no such mask, or T does not fit the mask's shape.

        Raises:
            ValueError: if the mask is not 2-D.
        """
        mask = None if name is None else self._inputs.masks[name]
        if mask is None:
            return None
        if mask.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}, but the auxiliary losses and routing statistics need one value per "
                "token; pass a (batch, sequence) mask, or None if every token is real"
            )
        positions, per_sequence = self._inputs.positions, shape.numel() // mask.shape[0]
        if shape.numel() % mask.shape[0] or per_sequence > mask.shape[1]:
            return None
        if name == "attention_mask" and positions is not None and per_sequence == len(positions):
            return mask[:, positions].reshape(-1) != 0
        # With a key-value cache the mask also covers tokens of earlier calls; this call's tokens are its last columns.
        return mask[:, mask.shape[1] - per_sequence :].reshape(-1) != 0

    def auxiliary_loss(self) -> Tensor | float:
        """Return the weighted sum c_lb L_lb + c_sp L_sparse + ... of the auxiliary losses of the last forward with gradients.

        Each loss is averaged over the adapted linears. The sum is 0.0 if no recorded loss has a nonzero coefficient.
        """
        # Skip terms with a zero coefficient, so that they never enter the graph and cannot turn the loss into NaN.
        weighted = [(term, self.weights.of(term)) for term in self.terms]
        return sum((weight * self.mean(term) for term, weight in weighted if weight), 0.0)

    def mean(self, term: str) -> Tensor | float:
        """Return the auxiliary loss `term`, averaged over the adapted linears; 0.0 if no linear recorded it."""
        values = self.terms.get(term, [])
        return torch.stack(values).mean() if values else 0.0

    def record_routing(
        self, names: Sequence[str], routing: Routing, mask_T: Tensor | None, losses: Sequence[str]
    ) -> None:
        """Record the auxiliary losses and statistics of the linears of an input group.

        A loss with a nonzero coefficient is also computed in a recomputation, where its value is dropped: torch's checkpoint
        requires that the recomputation saves the same tensors as the first forward. Any other loss is computed only in the
        first forward, without a graph.

        Args:
            names: names of the G linears, unique in the model.
            routing: routing of the G linears, (G, T, E).
            mask_T: True for real tokens; None counts every row (`token_mask`).
            losses: names of the losses that are defined for the router (`Router.losses`).
        """
        weights, terms = self.weights, {}
        for term in losses:
            differentiable = weights.of(term) != 0
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

    def observe(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        """Call the observer, if there is one, with the routing of a linear. A recomputation does not call it.

        Args:
            name: name of the linear, unique in the model.
            routing: routing of the linear, (T, E).
            mask_T: True for real tokens; None counts every row (`token_mask`).
        """
        if self.observer is not None and self._open:
            with torch.no_grad():
                self.observer(name, routing, mask_T)

    def check_not_reentrant(self) -> None:
        """Raise RuntimeError if this forward runs inside a reentrant checkpoint.

        A reentrant checkpoint disables gradients for its region, although the forward of the model has gradients enabled.
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
        """Return the decision that `owner` recorded at this point of the first forward.

        Return None outside a recomputation, and in a recomputation that does not use `checkpoint_contexts`.
        """
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
    """Context manager for the first forward or the recomputation of a checkpointed region. Regions may be nested."""

    def __init__(self, context: StepContext, tape: Tape, replaying: bool) -> None:
        self.context, self.tape, self.replaying = context, tape, replaying
        # The recomputation runs after the forward has ended, and possibly after another forward has begun.
        self._inputs, self._inputs_outside = context._inputs, context._inputs
        self._outer: _Region | None = None
        self._position: dict[Any, int] = {}

    def __enter__(self) -> None:
        self._outer, self.context._region = self.context._region, self
        self._inputs_outside, self.context._inputs = self.context._inputs, self._inputs
        self._position = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context._region, self.context._inputs = self._outer, self._inputs_outside

    def next_decision(self, owner: Any) -> Any:
        position = self._position.get(owner, 0)
        self._position[owner] = position + 1
        return self.tape[owner][position]
