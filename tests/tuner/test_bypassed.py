"""Linears whose parent takes their weight instead of calling them are refused by name."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, PretrainedConfig

from ldmole_dist import LdMoleConfig

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
