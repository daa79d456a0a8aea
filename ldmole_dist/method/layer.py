"""MoELinear: a frozen linear plus its mixture of LoRA experts. A tensor goes in, a tensor comes out.

The layer does not know how many processes there are: `dispatch` brings tokens and experts together (see `Dispatch`).

Shapes: T tokens, D in-features, O out-features, E experts in all, L experts held here, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ldmole_dist.method.context import StepContext
from ldmole_dist.method.experts import ExpertBank, apply_experts, fused_suffices
from ldmole_dist.method.routers import LambdaMLP, Routing, SparsegenRouter


class Dispatch(Protocol):
    """Brings the tokens of an input group (linears that read the same tensor) and their experts together.

    `plan` decides what moves, once; `__call__` carries it out, again if the forward is recomputed.
    """

    def plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank]) -> Any:
        """From the supports (T, E), one of each linear of the group, whatever `__call__` must know beforehand."""

    def __call__(
        self, x_TD: Tensor, routings: Sequence[Routing], banks: Sequence[ExpertBank], plan: Any
    ) -> list[Tensor]:
        """The experts' weighted sum (T, O) for each linear of the group, in the dtype of x."""


class LocalDispatch:
    """All experts are here: nothing moves."""

    def plan(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank]) -> list[list[int] | None]:
        """Tokens per expert for each linear, where a formulation has to be chosen by them."""
        return [
            None if fused_suffices(bank) else support.sum(dim=0).tolist()
            for support, bank in zip(supports, banks, strict=True)
        ]

    def __call__(
        self,
        x_TD: Tensor,
        routings: Sequence[Routing],
        banks: Sequence[ExpertBank],
        plan: list[list[int] | None],
    ) -> list[Tensor]:
        return [
            apply_experts(x_TD, routing.p_TE, bank, counts)
            for routing, bank, counts in zip(routings, banks, plan, strict=True)
        ]


class Decision(NamedTuple):
    """What a recomputed forward must not decide again: who is active, and what moves for it."""

    support_TE: Tensor
    plan: Any


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
        self.lambda_mlps: dict[str, LambdaMLP] = {}  # shared by many linears; the owner registers them

    def add_adapter(
        self, adapter: str, bank: ExpertBank, router: SparsegenRouter, lambda_mlp: LambdaMLP, dropout: float
    ) -> None:
        """Attach an adapter.

        Args:
            adapter: its name.
            bank: parameters A (L, R, D) and B (L, O, R).
            router: over all E experts.
            lambda_mlp: shared by the linears with this D.
            dropout: probability, acts on x before router, lambda-MLP and experts alike.
        """
        self.lora_A[adapter], self.lora_B[adapter] = bank.A_LRD, bank.B_LOR
        self.scaling[adapter] = bank.scaling
        self.router[adapter] = router
        self.lora_dropout[adapter] = nn.Dropout(dropout)
        self.lambda_mlps[adapter] = lambda_mlp

    def adapted(self, x: Tensor, adapter: str) -> Tensor:
        """Base output plus the named adapter's, (..., D) -> (..., O) in the dtype of the base output."""
        self.context.check_not_reentrant()
        y = self.base_layer(x)
        x_TD = self.lora_dropout[adapter](x).reshape(-1, x.shape[-1])
        bank = ExpertBank(self.lora_A[adapter], self.lora_B[adapter], self.scaling[adapter])
        router: Any = self.router[adapter]
        logits_TE, lam_T = router(x_TD), self.lambda_mlps[adapter](x_TD)

        decision = self.context.replayed(self)
        if decision is None:
            support_TE = router.decide(logits_TE, lam_T)
            decision = Decision(support_TE, self.dispatch.plan([support_TE], [bank]))
            self.context.remember(self, decision)
        routing = router.weigh(logits_TE, lam_T, decision.support_TE)

        if self.training:
            self.context.report(self.name, routing, x.shape[:-1])
        (delta_TO,) = self.dispatch(x_TD, [routing], [bank], decision.plan)
        return y + delta_TO.view(y.shape).to(y.dtype)
