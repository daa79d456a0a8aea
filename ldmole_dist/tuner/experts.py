"""LD-MoLE adapters in the routed experts of MoE backbones. transformers keeps their weights as one 3-D tensor per projection.

All base experts of a layer share one bank of LD-MoLE experts for each projection. With W_j the weight of base expert j:

    y_j(x) = W_j x + s * sum_e p_e(x) B_e A_e x

gate_up_proj reads tokens, so the sum over e is computed once for each token and added to the rows of all K base experts.
down_proj reads the N rows, which differ between the base experts of a token, so the sum is computed for each row.

`LdMoleExperts` replaces the experts module of the backbone. `experts_forward` is registered with transformers as an experts
implementation, and `LdMoleExperts.forward` selects this implementation only while it runs. Without an active adapter, the
backbone's own implementation runs.

Shapes: T tokens, K base experts of each token, N = T K rows, one for each pair of token and base expert; J base experts,
D in-features, O out-features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ldmole_dist.method.context import MaskName, StepContext
from ldmole_dist.method.layer import Dispatch
from ldmole_dist.tuner.grouped_linear import grouped_linear
from ldmole_dist.tuner.layer import LdMoleLayer

IMPLEMENTATION = "ldmole"  # name of `experts_forward` in transformers' registry
GATE_UP, DOWN = "gate_up_proj", "down_proj"


class LdMoleProjection(LdMoleLayer):
    """Adapters of one projection of the routed experts; the frozen weights stay in the experts module.

    Args:
        name: name of the parameter that holds the frozen weights, unique in the model.
        context: step context, shared by all adapted linears of the model.
        dispatch: dispatch of the projection.
        experts: experts module of transformers.
        in_features: D.
        out_features: O.
    """

    def __init__(
        self,
        name: str,
        context: StepContext,
        dispatch: Dispatch,
        experts: nn.Module,
        in_features: int,
        out_features: int,
    ) -> None:
        super().__init__(name, context, dispatch)
        self.in_features, self.out_features = in_features, out_features
        self._experts = (experts,)  # in a tuple, so that its parameters are not registered here as well

    @property
    def frozen_weight(self) -> Tensor:
        """The frozen weights of all base experts, (J, O, D) or (J, D, O), or the part of them that this rank holds."""
        weight = getattr(self._experts[0], self.name.rpartition(".")[2])
        assert isinstance(weight, Tensor)
        return weight

    def forward(
        self, x: Tensor, base: Callable[[], Tensor], token_N: Tensor | None = None, rows_per_token: int = 1
    ) -> Tensor:
        """Return the frozen product plus the output of the active adapter, if there is one, (N, O).

        Args:
            x: input that the adapter reads: tokens (T, D) or rows (N, D).
            base: computes the frozen product (N, O). It overlaps with the communication of the dispatch.
            token_N: if x are tokens, the token of each row of the frozen product.
            rows_per_token: if x are rows, the number of consecutive rows that belong to the same token.
        """
        adapter = self.applied_adapter
        if adapter is None:
            return base()
        finish = self.groups[adapter].start(self, x, rows_per_token)
        y_NO = base()
        delta = finish().to(y_NO.dtype)
        return y_NO + (delta if token_N is None else delta[token_N])

    def _get_name(self) -> str:
        return "ldmole.Projection"


class LdMoleExperts(nn.Module):
    """The routed experts of a layer with the adapters of their projections, in the place of the backbone's module.

    Args:
        base_layer: experts module of transformers.
        name: name of the module in the backbone.
        context: step context, shared by all adapted linears of the model.
        new_dispatch: creates the dispatch of a projection.
    """

    def __init__(
        self, base_layer: nn.Module, name: str, context: StepContext, new_dispatch: Callable[[], Dispatch]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self._context, self._new_dispatch = name, context, new_dispatch
        config: Any = copy.deepcopy(base_layer.config)
        config._experts_implementation = IMPLEMENTATION
        self._config = config

    @property
    def projections(self) -> dict[str, LdMoleProjection]:
        """The adapted projections, by name ("gate_up_proj", "down_proj")."""
        return {name: module for name, module in self._modules.items() if isinstance(module, LdMoleProjection)}

    def projection(self, name: str, in_features: int, out_features: int) -> LdMoleProjection:
        """Return the module that holds the adapters of a projection; create it on first use.

        Args:
            name: "gate_up_proj" or "down_proj".
            in_features: D.
            out_features: O.
        """
        if name not in self.projections:
            where = f"{self.name}.{name}", self._context, self._new_dispatch()
            self.add_module(name, LdMoleProjection(*where, self.base_layer, in_features, out_features))
        return self.projections[name]

    def set_mask(self, name: MaskName | None) -> None:
        """Set the mask that covers the tokens that the experts read; None if no mask is known to cover them."""
        for projection in self.projections.values():
            projection.mask_name = name

    def get_base_layer(self) -> nn.Module:
        """Return the experts module of the backbone; PEFT calls this to unload the adapters."""
        return self.base_layer

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Apply the routed experts and their active adapters.

        Args:
            args: hidden states (T, D), and (T, K) index and weights of the base experts of each token.
            kwargs: the same arguments, passed by name.

        Returns:
            (T, D).

        Raises:
            ValueError: if the backbone uses an experts implementation that an adapter cannot replace.
        """
        projections = self.projections
        if all(projection.applied_adapter is None for projection in projections.values()):
            return self.base_layer(*args, **kwargs)
        base: Any = self.base_layer
        config = base.config
        check_implementation(config._experts_implementation, self.name)
        base.config = self._config
        try:
            return base(*args, **kwargs, projections=projections)
        finally:
            base.config = config


def check_implementation(implementation: str | None, name: str) -> None:
    """Raise ValueError unless `experts_forward` computes what this experts implementation of transformers computes."""
    if implementation not in (None, "eager", "batched_mm", "grouped_mm"):
        raise ValueError(
            f"LD-MoLE does not support experts_implementation={implementation!r} of {name}; call "
            "model.set_experts_implementation('grouped_mm')"
        )


def experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    projections: Mapping[str, LdMoleProjection],
) -> Tensor:
    """Apply routed experts with adapters. Without adapters, this computes what transformers' `grouped_mm` computes.

    Args:
        experts: experts module of transformers.
        hidden_states: (T, D).
        top_k_index: (T, K) base experts of each token.
        top_k_weights: (T, K) weights of these base experts.
        projections: adapters by the name of their projection.

    Returns:
        (T, D) in the dtype of `hidden_states`.
    """
    T, K = top_k_index.shape
    # The frozen products need rows sorted by base expert; adapters read rows sorted by token.
    expert_N, order_N = top_k_index.reshape(-1).sort(stable=True)
    token_N, place_N = order_N // K, order_N.argsort()
    # torch.bincount would synchronize the device; searchsorted does not.
    every_J = torch.arange(experts.num_experts, device=expert_N.device)
    ends_J = torch.searchsorted(expert_N, every_J, right=True).to(torch.int32)

    def product(name: str, x_ND: Tensor) -> Tensor:
        y_NO = grouped_linear(x_ND, getattr(experts, name), ends_J, experts.is_transposed)
        return y_NO + getattr(experts, f"{name}_bias")[expert_N] if experts.has_bias else y_NO

    def up() -> Tensor:
        return product(GATE_UP, hidden_states[token_N])

    def down() -> Tensor:
        return product(DOWN, hidden_ND)[place_N]

    gate_up = projections[GATE_UP](hidden_states, up, token_N=token_N) if GATE_UP in projections else up()
    hidden_ND = experts._apply_gate(gate_up)
    y_ND = projections[DOWN](hidden_ND[place_N], down, rows_per_token=K) if DOWN in projections else down()
    weighted = y_ND.view(T, K, -1) * top_k_weights.reshape(T, K, 1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
