"""Adapted linears as tuner layers of PEFT.

Shapes: D in-features, O out-features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ldmole_dist.method.layer import MoEAdapters, MoELinear
from ldmole_dist.tuner.quantized import stored_weight
from ldmole_dist.tuner.targets import features_of


class LdMoleLayer(MoEAdapters, BaseTunerLayer):
    """`MoEAdapters` with the attributes and methods that PEFT expects of a tuner layer.

    Attributes:
        in_features: D.
        out_features: O.
    """

    adapter_layer_names = ("ldmole_adapters",)
    other_param_names = ("lambda_mlps", "groups")

    in_features: int
    out_features: int

    @property
    def frozen_weight(self) -> Tensor:
        """The frozen weight as it is stored. It may be packed or partitioned: rely only on its device and dtype."""
        raise NotImplementedError

    @property
    def applied_adapter(self) -> str | None:
        """Name of the adapter that a forward applies; None if adapters are disabled or this layer lacks the active one."""
        if self.disable_adapters or self.context.adapter_disabled:
            return None
        return next((name for name in self.active_adapters if name in self.ldmole_adapters), None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Raises:
            ValueError: if more than one name is given. Routing over the experts of several adapters is not defined.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"LD-MoLE activates one adapter at a time, not {adapter_names}; choose one of them")
        super().set_adapter(adapter_names, inference_mode)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Freeze the experts of adapters with `train_experts=False`, after PEFT has made a whole adapter trainable."""
        adapters: Any = self.ldmole_adapters.values()
        for adapter in adapters:
            if not adapter.train_experts:
                adapter.lora_A.requires_grad_(False)
                adapter.lora_B.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter and its lambda-MLP to a device, by default that of the frozen weight.

        PEFT's own method would also change the dtype.
        """
        for module in (self.ldmole_adapters.get_submodule(adapter_name), self.lambda_mlps[adapter_name]):
            if module is not None:
                module.to(device or self.frozen_weight.device)


class LdMoleLinear(MoELinear, LdMoleLayer):
    """`MoELinear` as a tuner layer of PEFT."""

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """D of the base layer."""
        return features_of(self.get_base_layer())[0]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """O of the base layer."""
        return features_of(self.get_base_layer())[1]

    @property
    def frozen_weight(self) -> Tensor:
        """The weight of the base layer as it is stored, packed if the layer is quantized."""
        return stored_weight(self.get_base_layer())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the frozen linear and, unless adapters are disabled, the active adapter.

        Args:
            x: (..., D).

        Returns:
            (..., O).
        """
        adapter = self.applied_adapter
        return self.base_layer(x) if adapter is None else self.forward_with_adapter(x, adapter)

    def _get_name(self) -> str:
        return "ldmole.Linear"
