"""Adapted linears: a frozen linear plus a mixture of LoRA experts (paper, section 3).

The code of a linear does not depend on the number of processes: a `Dispatch` brings tokens and experts together.

Shapes: T tokens, D in-features, O out-features, E experts in total, L experts held here, R LoRA rank, G linears of an input
group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldmole_dist.method.autocast import to_autocast_dtype, without_autocast
from ldmole_dist.method.context import MaskName, StepContext
from ldmole_dist.method.experts import ExpertBank, apply_experts, fused_is_always_faster
from ldmole_dist.method.lambda_mlp import LambdaMLP
from ldmole_dist.method.routers import Router, Routing

# Waits for a started dispatch and returns the experts' weighted sum (T, O) for each linear that the dispatch was started for.
Finish = Callable[[], list[Tensor]]


class Dispatch(Protocol):
    """Brings the tokens of an input group and their experts together.

    The first forward calls `decide`, then `start` with the decision. A recomputed forward that replays the decision
    (`StepContext.checkpoint_contexts`) calls only `start`.
    """

    def decide(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> Any:
        """Return the decision that `start` carries out. Over several ranks this is collective: all of them must call it.

        Args:
            supports: (T, E) bool, one for each linear of the group.
            banks: experts held here, one bank for each linear.
            name: name of the first linear.
        """

    def start(
        self,
        x_TD: Tensor,
        routings: Sequence[Routing],
        banks: Sequence[ExpertBank],
        decision: Any,
        repeated: bool = False,
    ) -> Finish:
        """Start the communication and return the function that waits for it and computes the experts.

        Work between `start` and the call of that function overlaps with the communication. Over several ranks, both calls are
        collective.

        Args:
            x_TD: input of the group, after dropout.
            routings: routing of the T tokens, one for each linear.
            banks: experts held here, one bank for each linear.
            decision: decision that `decide` returned.
            repeated: whether a recomputed forward replays the decision.
        """


class LocalDispatch:
    """Dispatch of a process that holds all experts: there is nothing to communicate."""

    def decide(self, supports: Sequence[Tensor], banks: Sequence[ExpertBank], name: str) -> list[list[int] | None]:
        """Return, for each linear, the number of active tokens of each expert, or None if `fused_is_always_faster`."""
        # .tolist() synchronizes the device, so skip it where the counts are not needed.
        return [
            None if fused_is_always_faster(bank) else support.sum(dim=0).tolist()
            for support, bank in zip(supports, banks, strict=True)
        ]

    def start(
        self,
        x_TD: Tensor,
        routings: Sequence[Routing],
        banks: Sequence[ExpertBank],
        decision: list[list[int] | None],
        repeated: bool = False,
    ) -> Finish:
        """See `Dispatch`."""
        return lambda: [
            apply_experts(x_TD, routing.p_TE, bank, counts)
            for routing, bank, counts in zip(routings, banks, decision, strict=True)
        ]


class RoutingDecision(NamedTuple):
    """Decision that a recomputed forward replays: the active experts, and the decision of the dispatch."""

    support_GTE: Tensor
    dispatch: Any


class InputGroup:
    """One or more linears that read the same tensor, in the order in which the model calls them.

    The first linear, the leader, computes the adapter's output for all of them, with one dropout mask, one lambda per token and
    one dispatch. If another linear of the group is then called with the same tensor, it returns the output that the leader
    computed for it; with a different tensor, it computes its own output.

    Args:
        linears: linears that have the adapter.
        adapter: name of the adapter.
    """

    def __init__(self, linears: Sequence[MoEAdapters], adapter: str) -> None:
        self.linears, self.adapter = list(linears), adapter
        # Outputs of the other linears, with the key of the input that they were computed from.
        self._waiting: dict[MoEAdapters, tuple[tuple[int, torch.Size, int], Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_waiting": {}}  # outputs of a forward, whose tensors are part of its graph

    def start(self, linear: MoEAdapters, x: Tensor, rows_per_token: int = 1) -> Callable[[], Tensor]:
        """Start computing the adapter's output of `linear` for x (..., D).

        Args:
            linear: linear of the group.
            x: its input.
            rows_per_token: number of consecutive rows of x that belong to the same token.

        Returns:
            A function that waits for the communication and returns the output, (..., O).
        """
        computed_for, delta = self._waiting.pop(linear, (None, None))
        key = _identity(x)
        if delta is not None and computed_for == key:
            return lambda: delta
        # The leader computes for the whole group. Another linear gets here only if the leader computed no output for this
        # call, for example because their inputs differ; the linear then computes for itself alone.
        linears = self.linears if linear is self.linears[0] else [linear]
        x_cast = to_autocast_dtype(x)
        with without_autocast(x.device.type):
            dispatched = self._route(linears, x_cast, rows_per_token)

        def finish() -> Tensor:
            with without_autocast(x.device.type):
                deltas = [delta_TO.view(*x.shape[:-1], delta_TO.shape[1]) for delta_TO in dispatched()]
            self._waiting = {m: (key, d) for m, d in zip(linears[1:], deltas[1:], strict=True)}
            return deltas[0]

        return finish

    def _route(self, linears: list[MoEAdapters], x: Tensor, rows_per_token: int) -> Finish:
        leader, adapter = linears[0], self.adapter
        context, dispatch = leader.context, leader.dispatch
        context.check_not_reentrant()
        adapters: list[Any] = [m.ldmole_adapters[adapter] for m in linears]
        x_TD = adapters[0].dropout(x).reshape(-1, x.shape[-1])
        read_TD = context.router_input(leader.name, x_TD)
        lambda_mlp = leader.lambda_mlps[adapter]
        lam_T = None if lambda_mlp is None else lambda_mlp(read_TD)
        banks = [a.bank for a in adapters]
        logits = [a.router(read_TD) for a in adapters]
        if leader.training and context.noise is not None:
            logits = [context.noise.add_to(u_TE, m.name) for m, u_TE in zip(linears, logits, strict=True)]

        # All routers of a group are of the same class and differ only in W_g, so one of them handles the stacked scores.
        router, logits_GTE, names = adapters[0].router, torch.stack(logits), [m.name for m in linears]
        decision = context.replay_decision(leader)
        repeated = decision is not None
        if decision is None:
            support_GTE = router.decide(logits_GTE, lam_T)
            decision = RoutingDecision(support_GTE, dispatch.decide(support_GTE.unbind(), banks, leader.name))
            context.record_decision(leader, decision)
        routing = router.weigh(logits_GTE, lam_T, decision.support_GTE)
        routings = routing.by_linear()
        # Forwards without gradients, such as those of generation, add nothing to the auxiliary losses.
        records = leader.training and torch.is_grad_enabled()
        if records or context.observer is not None:
            tokens = x.shape[:-1] if rows_per_token == 1 else torch.Size([len(x_TD) // rows_per_token])
            mask_T = context.token_mask(leader.mask_name, tokens)
            if mask_T is not None:
                mask_T = mask_T.repeat_interleave(rows_per_token)
            if records:
                context.record_routing(names, routing, mask_T, router.losses)
            for name, of_linear in zip(names, routings, strict=True):
                context.observe(name, of_linear, mask_T)
        return dispatch.start(x_TD, routings, banks, decision.dispatch, repeated)


def _identity(x: Tensor) -> tuple[int, torch.Size, int]:
    """Return address, shape and version of an input; if they are equal, two linears got the same, unchanged tensor."""
    # Addresses, not objects: ZeRO-3's hooks pass each linear a different tensor object for the same input. Under torch.export,
    # tensors have no address, and the objects are the same.
    address = id(x) if torch.compiler.is_exporting() else x.data_ptr()
    # The version, which these objects share, tells whether the tensor has been changed in place. torch.compile cannot read it,
    # and tensors made in inference mode have none: there, an in-place change is not detected.
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    return address, x.shape, version


class LinearAdapter(nn.Module):
    """The modules of one adapter in one linear: experts, router and dropout. `InputGroup` computes with them.

    Args:
        bank: experts held here, A (L, R, D) and B (L, O, R).
        router: router over all E experts; reads the input of the linear, or the `hidden` states of `StepContext.begin`.
        dropout: dropout probability of the linear's input as read by the experts, the router and the lambda-MLP.

    Attributes:
        train_experts: whether the experts are trained; the tuner freezes them otherwise.
    """

    train_experts = True

    def __init__(self, bank: ExpertBank, router: Router, dropout: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scaling = bank
        self.router = router
        self.dropout = nn.Dropout(dropout)

    @property
    def bank(self) -> ExpertBank:
        """The experts held here."""
        return ExpertBank(self.lora_A, self.lora_B, self.scaling)


class MoEAdapters(nn.Module):
    """The adapters of one linear, or of one projection of routed experts, by name.

    The output of an adapter is s * sum_e p_e(x) B_e A_e x, with p from its router. A router with `needs_lambda` gets lambda
    from the shared lambda-MLP.

    Args:
        name: name of the linear, unique in the model.
        context: step context, shared by all adapted linears of the model.
        dispatch: `LocalDispatch`, or a dispatch over several ranks.

    Attributes:
        mask_name: mask that covers the rows of the linear's input; None if no mask does, so that every row counts.
    """

    mask_name: MaskName | None = "attention_mask"

    def __init__(self, name: str, context: StepContext, dispatch: Dispatch) -> None:
        super().__init__()
        self.name, self.context, self.dispatch = name, context, dispatch
        self.ldmole_adapters = nn.ModuleDict()
        # A plain dict, not a ModuleDict: many linears share an MLP, which the tuner registers once.
        self.lambda_mlps: dict[str, LambdaMLP | None] = {}
        self.groups: dict[str, InputGroup] = {}

    def add_adapter(
        self, adapter: str, bank: ExpertBank, router: Router, lambda_mlp: LambdaMLP | None, dropout: float
    ) -> LinearAdapter:
        """Attach an adapter and return its module.

        Args:
            adapter: name of the adapter.
            bank: experts held here, A (L, R, D) and B (L, O, R).
            router: see `LinearAdapter`.
            lambda_mlp: lambda-MLP for the router's input size; None if the router does not need lambda.
            dropout: see `LinearAdapter`; not applied to the `hidden` states, nor to the input of the base layer.
        """
        added = self.ldmole_adapters[adapter] = LinearAdapter(bank, router, dropout)
        self.lambda_mlps[adapter] = lambda_mlp
        self.groups[adapter] = InputGroup([self], adapter)
        return added


class MoELinear(MoEAdapters):
    """y = W0 x + s * sum_e p_e(x) B_e A_e x: a frozen linear with its adapters, one of which a forward applies.

    Args:
        base_layer: the frozen linear, (..., D) -> (..., O).
        name: see `MoEAdapters`.
        context: see `MoEAdapters`.
        dispatch: see `MoEAdapters`.
    """

    def __init__(self, base_layer: nn.Module, name: str, context: StepContext, dispatch: Dispatch) -> None:
        super().__init__(name, context, dispatch)
        self.base_layer = base_layer

    def forward_with_adapter(self, x: Tensor, adapter: str) -> Tensor:
        """Return the output of the base layer plus the adapter's, (..., O) in the dtype of the base layer's output."""
        finish = self.groups[adapter].start(self, x)
        # The base layer overlaps with the dispatch's all-to-all, and its backward with the all-to-all of the gradients.
        y = self.base_layer(x)
        return y + finish().to(y.dtype)
