"""The adapted linear layer, as PEFT sees it.

Shapes: D in-features, O out-features.
"""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ldmole_dist.method.layer import MoELinear


class LdMoleLinear(MoELinear, BaseTunerLayer):
    """`MoELinear` with the attributes and methods that PEFT expects of a tuner layer."""

    adapter_layer_names = ("lora_A", "lora_B", "router")
    other_param_names = ("lora_dropout", "scaling", "lambda_mlps", "groups")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the frozen linear and, unless adapters are disabled, the active adapter.

        Args:
            x: (..., D).

        Returns:
            (..., O).
        """
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active or self.context.adapter_disabled:
            return self.base_layer(x)
        return self.forward_with_adapter(x, active[0])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Raises:
            ValueError: if more than one name is given. Routing over the experts of several adapters is not defined.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"LD-MoLE activates one adapter at a time, not {adapter_names}; choose one of them")
        super().set_adapter(adapter_names, inference_mode)
