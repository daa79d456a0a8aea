"""Which adapter is active, and which of its parameters are trained: the methods of PEFT's tuner, with the lambda-MLPs.

PEFT's methods change only the parameters inside tuner layers. The lambda-MLPs are shared by the layers and belong to the tuner,
so the methods here extend PEFT's methods to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ldmole_dist.method.sparsegen import at_least_float32
from ldmole_dist.tuner.layer import LdMoleLayer


class TrainableAdapters(BaseTuner):
    """Part of `LdMoleModel`: activating, freezing, converting and deleting adapters.

    Attributes:
        ldmole_lambda_mlp: lambda-MLPs, by adapter name and then by input size.
        adapters_enabled: whether adapters are enabled; False within `disable_adapter` and after `disable_adapter_layers`.
    """

    ldmole_lambda_mlp: nn.ModuleDict
    adapters_enabled: bool = True

    def adapted_layers(self, adapter_name: str) -> Iterator[LdMoleLayer]:
        """Yield the linears and projections of routed experts that have the adapter, in the order of the model."""
        for module in self.model.modules():
            if isinstance(module, LdMoleLayer) and adapter_name in module.ldmole_adapters:
                yield module

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter and freeze all others, including their lambda-MLPs; `inference_mode` freezes all adapters."""
        super().set_adapter(adapter_name, inference_mode)
        for name, mlps in self.ldmole_lambda_mlp.items():
            mlps.requires_grad_(name in self.active_adapters and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters. The experts of an adapter with `train_experts=False` stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.ldmole_lambda_mlp:
                self.ldmole_lambda_mlp[name].requires_grad_(requires_grad)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.adapters_enabled = enabled
        for name, mlps in self.ldmole_lambda_mlp.items():
            mlps.requires_grad_(enabled and name in self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its lambda-MLPs."""
        super().delete_adapter(adapter_name)
        del self.ldmole_lambda_mlp[adapter_name]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Convert an adapter to the dtype of its linears; if `autocast_adapter_dtype` or quantized, to at least float32."""
        for layer in self.adapted_layers(adapter_name):
            dtype = layer.frozen_weight.dtype
            if autocast_adapter_dtype or not dtype.is_floating_point:
                dtype = at_least_float32(dtype)
            layer.ldmole_adapters[adapter_name].to(dtype)
            if (lambda_mlp := layer.lambda_mlps[adapter_name]) is not None:
                lambda_mlp.to(dtype)
