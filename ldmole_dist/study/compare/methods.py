"""The methods to compare, loaded from methods.yaml. Each method overrides a few keys of the run config."""

from __future__ import annotations

from importlib.resources import files
from typing import Any, NamedTuple

import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from ldmole_dist.config import Adapter
from ldmole_dist.method.names import ROUTER_NAMES
from ldmole_dist.tuner.config import LdMoleConfig

BASELINE = "sparsegen"  # method that the others are compared with, for each seed


class Method(NamedTuple):
    """A method of the comparison.

    Args:
        title: name of the method in the tables.
        overrides: overrides of the run config, such as "adapter.router=topk".
    """

    title: str
    overrides: list[str]


METHODS = {
    name: Method(**fields)
    for name, fields in yaml.safe_load(files(__package__).joinpath("methods.yaml").read_text()).items()
}
DEFAULT = ROUTER_NAMES  # methods to run if --methods is not set; the method with a router's name uses this router


def overrides_of(name: str, adapter: Adapter, backbone: str) -> list[str]:
    """Return the config overrides of a method.

    For plain LoRA, the overrides set r so that plain LoRA has about as many parameters as the LD-MoLE adapter, with the same
    alpha / r.

    Args:
        name: name of the method.
        adapter: adapter config that all methods start from.
        backbone: path of the frozen model.
    """
    overrides = list(METHODS[name].overrides)
    if name == "lora":
        lora_rank = equal_lora_rank(backbone, adapter)
        alpha = adapter.lora_alpha / adapter.r * lora_rank  # keeps the scaling alpha / r
        overrides += ["adapter.num_experts=1", f"adapter.r={lora_rank}", f"adapter.lora_alpha={alpha}"]
    return overrides


def equal_lora_rank(backbone: str, adapter: Adapter) -> int:
    """Return the r of a plain LoRA whose number of parameters is closest to that of an LD-MoLE adapter.

    Args:
        backbone: path of the frozen model; its weights are not loaded.
        adapter: config of the LD-MoLE adapter.
    """

    def parameters(**fields: Any) -> int:
        targets: dict[str, Any] = dict(
            target_modules=adapter.target_modules, target_parameters=adapter.target_parameters
        )
        config = LdMoleConfig(task_type="CAUSAL_LM", **targets, **fields)
        with torch.device("meta"):
            model = get_peft_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(backbone)), config)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    ours = parameters(num_experts=adapter.num_experts, r=adapter.r, lambda_hidden=adapter.lambda_hidden)
    return max(1, round(ours / parameters(num_experts=1, r=1, router="lora")))
