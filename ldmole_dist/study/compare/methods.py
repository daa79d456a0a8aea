"""The methods to compare, loaded from methods.yaml. Each overrides a few keys of the same run config."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

import torch
import yaml
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ldmole_dist.config import Adapter
from ldmole_dist.method.names import ROUTER_NAMES
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.targets import experts_of_linear

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
DEFAULT = ROUTER_NAMES


def overrides_of(name: str, adapter: Adapter, backbone: str) -> list[str]:
    """Return the config overrides of a method.

    For plain LoRA they set r so that it has about as many parameters as the LD-MoLE adapter, with the same alpha / r.

    Args:
        name: name of the method.
        adapter: adapter config that all methods start from.
        backbone: path of the frozen model.
    """
    overrides = list(METHODS[name].overrides)
    if name == "lora":
        lora_rank = equal_lora_rank(linears_of(backbone, adapter), adapter)
        alpha = adapter.lora_alpha / adapter.r * lora_rank  # keeps the scaling alpha / r
        overrides += ["adapter.num_experts=1", f"adapter.r={lora_rank}", f"adapter.lora_alpha={alpha}"]
    return overrides


def linears_of(backbone: str, adapter: Adapter) -> list[tuple[int, int, int]]:
    """Return the sizes of every adapted linear, without loading the weights.

    Args:
        backbone: path of the frozen model.
        adapter: config of the LD-MoLE adapter.

    Returns:
        (in-features D, out-features O, experts E) for each linear.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(backbone))
    config = LdMoleConfig(num_experts=adapter.num_experts, target_modules=adapter.target_modules)
    return [
        (module.in_features, module.out_features, experts_of_linear(model, config, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
    ]


def equal_lora_rank(linears: list[tuple[int, int, int]], adapter: Adapter) -> int:
    """Return the r of a plain LoRA whose number of parameters is closest to that of an LD-MoLE adapter.

    Args:
        linears: (in-features D, out-features O, experts E) of each adapted linear.
        adapter: config of the LD-MoLE adapter.
    """
    experts = adapter.r * sum(E * (D + O) for D, O, E in linears)
    routers = sum(E * D for D, _, E in linears)
    hidden = adapter.lambda_hidden
    lambda_mlps = sum(hidden * D + 2 * hidden + 1 for D in {D for D, _, _ in linears})
    return max(1, round((experts + routers + lambda_mlps) / sum(D + O for D, O, _ in linears)))
