"""MoELinear: a frozen linear plus its mixture of LoRA experts. A tensor goes in, a tensor comes out.

The layer does not know how many processes there are: `dispatch` brings tokens and experts together (see `Dispatch`).

Shapes: T tokens, D in-features, O out-features, E experts in all, L experts held here, R LoRA rank, G linears of an input
group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldmole_dist.method.context import StepContext
from ldmole_dist.method.experts import ExpertBank, apply_experts, fused_suffices
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.routers import Router, Routing

Finish = Callable[[], list[Tensor]]


class Dispatch(Protocol):
    """Brings the tokens of an input group and their experts together.

    `plan` decides what moves, once; `start` carries it out, again if the forward is recomputed.
    """

    def plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> Any:
        """From the supports (T, E), one of each linear of the group called `name`, what `start` must know beforehand."""

    def start(
        self,
        x_TD: Tensor,
        routings: Sequence[Routing],
        banks: Sequence[ExpertBank],
        plan: Any,
        repeated: bool = False,
    ) -> Finish:
        """Set moving what has to move. The function returned waits for it and gives, for each linear of the group, the
        experts' weighted sum (T, O) in the dtype of x; what is computed before it is called does not wait. `repeated`: in a
        recomputed forward."""


class LocalDispatch:
    """All experts are here: nothing moves."""

    def plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> list[list[int] | None]:
        """Tokens per expert for each linear, where a formulation has to be chosen by them."""
        return [
            None if fused_suffices(bank) else support.sum(dim=0).tolist()
            for support, bank in zip(supports, banks, strict=True)
        ]

    def start(
        self,
        x_TD: Tensor,
        routings: Sequence[Routing],
        banks: Sequence[ExpertBank],
        plan: list[list[int] | None],
        repeated: bool = False,
    ) -> Finish:
        """See `Dispatch`."""
        return lambda: [
            apply_experts(x_TD, routing.p_TE, bank, counts)
            for routing, bank, counts in zip(routings, banks, plan, strict=True)
        ]


class Decision(NamedTuple):
    """What a recomputed forward must not decide again: who is active, and what moves for it."""

    support_GTE: Tensor
    plan: Any


class InputGroup:
    """Linears that read the same tensor, in the order in which the model calls them; a group of one is legal.

    The first that is called computes for all: one dropout mask, one lambda for each token, one dispatch. The others pick
    their part up when they are called with the same tensor.

    Args:
        members: MoELinears that hold `adapter`.
        adapter: its name.
    """

    def __init__(self, members: Sequence[MoELinear], adapter: str) -> None:
        self.members, self.adapter = list(members), adapter
        self._waiting: dict[MoELinear, tuple[tuple[int, torch.Size], Tensor]] = {}

    def start(self, member: MoELinear, x: Tensor) -> Callable[[], Tensor]:
        """Begin the adapter's part of the output of `member`, (..., D) -> (..., O); the function returned finishes it."""
        given, delta = self._waiting.pop(member, (None, None))
        if delta is not None and given == (x.data_ptr(), x.shape):
            return lambda: delta
        # Not a follower, or one that was given another tensor than its leader: then it goes alone.
        members = self.members if member is self.members[0] else [member]
        dispatched = self._route(members, x)

        def finish() -> Tensor:
            deltas = [delta_TO.view(*x.shape[:-1], delta_TO.shape[1]) for delta_TO in dispatched()]
            self._waiting = {m: ((x.data_ptr(), x.shape), d) for m, d in zip(members[1:], deltas[1:], strict=True)}
            return deltas[0]

        return finish

    def _route(self, members: list[MoELinear], x: Tensor) -> Finish:
        leader, adapter = members[0], self.adapter
        context, dispatch = leader.context, leader.dispatch
        context.check_not_reentrant()
        x_TD = leader.lora_dropout[adapter](x).reshape(-1, x.shape[-1])
        read_TD = context.read(leader.name, x_TD)
        lambda_mlp = leader.lambda_mlps[adapter]
        lam_T = None if lambda_mlp is None else lambda_mlp(read_TD)
        routers: list[Any] = [m.router[adapter] for m in members]
        banks = [ExpertBank(m.lora_A[adapter], m.lora_B[adapter], m.scaling[adapter]) for m in members]
        logits = [router(read_TD) for router in routers]
        if leader.training and context.noise is not None:
            logits = [context.noise.added(u_TE, m.name) for m, u_TE in zip(members, logits, strict=True)]

        # The routers of a model are of one kind and differ in their scores only: one of them goes on for all.
        router, logits_GTE, names = routers[0], torch.stack(logits), [m.name for m in members]
        decision = context.replayed(leader)
        repeated = decision is not None
        if decision is None:
            support_GTE = router.decide(logits_GTE, lam_T)
            decision = Decision(support_GTE, dispatch.plan(support_GTE.unbind(), banks, leader.name))
            context.remember(leader, decision)
        routing = router.weigh(logits_GTE, lam_T, decision.support_GTE)
        if leader.training:
            context.report(names, routing, x.shape[:-1], router.losses)
        routings = routing.by_linear()
        for name, of_linear in zip(names, routings, strict=True):
            context.observe(name, of_linear, x.shape[:-1])
        return dispatch.start(x_TD, routings, banks, decision.plan, repeated)


class MoELinear(nn.Module):
    """y = W0 x + s * sum_e p_e(x) B_e A_e x, with p from the router and lambda from the shared MLP.

    Several adapters may be held by name; one is active at a time.

    Args:
        base_layer: the frozen linear, (..., D) -> (..., O).
        name: of the linear, unique in the model.
        context: of the model that the linear belongs to.
        dispatch: how tokens and experts come together.
    """

    def __init__(self, base_layer: nn.Module, name: str, context: StepContext, dispatch: Dispatch) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.context, self.dispatch = name, context, dispatch
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.router = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.lambda_mlps: dict[str, LambdaMLP | None] = {}  # shared by many linears; the owner registers them
        self.groups: dict[str, InputGroup] = {}

    def add_adapter(
        self, adapter: str, bank: ExpertBank, router: Router, lambda_mlp: LambdaMLP | None, dropout: float
    ) -> None:
        """Attach an adapter.

        Args:
            adapter: its name.
            bank: parameters A (L, R, D) and B (L, O, R).
            router: over all E experts, of D features or of what routers read instead (`StepContext.read`).
            lambda_mlp: shared by the linears with this D; None where the router needs none.
            dropout: probability, acts on x before router, lambda-MLP and experts alike.
        """
        self.lora_A[adapter], self.lora_B[adapter] = bank.A_LRD, bank.B_LOR
        self.scaling[adapter] = bank.scaling
        self.router[adapter] = router
        self.lora_dropout[adapter] = nn.Dropout(dropout)
        self.lambda_mlps[adapter] = lambda_mlp
        self.groups[adapter] = InputGroup([self], adapter)

    def adapted(self, x: Tensor, adapter: str) -> Tensor:
        """Base output plus the named adapter's, (..., D) -> (..., O) in the dtype of the base output."""
        finish = self.groups[adapter].start(self, x)
        y = self.base_layer(x)  # while rows and experts travel; in the backward, while their gradients do
        return y + finish().to(y.dtype)
