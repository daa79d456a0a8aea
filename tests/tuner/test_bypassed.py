"""Linears whose parent takes their weight instead of calling them are refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, PretrainedConfig

from ldmole_dist import LdMoleConfig
from ldmole_dist.tuner.bypassed import is_bypassed

MAMBA = MambaConfig(vocab_size=8, hidden_size=8, state_size=4, num_hidden_layers=1)
MAMBA2 = Mamba2Config(
    vocab_size=8, hidden_size=8, num_heads=2, head_dim=8, n_groups=1, state_size=4, num_hidden_layers=1
)


@pytest.mark.parametrize(
    ("config", "bypassed"),
    [(MAMBA, ["dt_proj", "out_proj", "x_proj"]), (MAMBA2, ["out_proj"])],
    ids=["mamba", "mamba2"],
)
def test_fused_kernels_of_mamba(config: PretrainedConfig, bypassed: list[str]) -> None:
    for name in bypassed:
        with pytest.raises(ValueError, match=f"{name}.*may take its weight.*add '{name}' to exclude_modules"):
            get_peft_model(AutoModelForCausalLM.from_config(config), LdMoleConfig(target_modules=[name]))
    settings = LdMoleConfig(num_experts=2, r=2, target_modules="all-linear", exclude_modules=bypassed)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    assert model.targeted_module_names == ["backbone.layers.0.mixer.in_proj"]


class Parent(nn.Module):
    """Takes the weights of two of its linears, and only looks at that of the third."""

    def __init__(self) -> None:
        super().__init__()
        self.argument, self.factor, self.called = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        nn.init.normal_(self.called.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.called.weight, Tensor) and self.called.weight.dtype != torch.int8:
            x = self.called(x.to(self.called.weight.dtype))
        return F.linear(x, self.argument.weight) + self.factor.weight @ x


def test_weight_as_an_operand() -> None:
    assert [name for name, _ in Parent().named_children() if is_bypassed(Parent(), name)] == ["argument", "factor"]
