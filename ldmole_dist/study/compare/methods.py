"""What is compared: each method is the same run with a few keys of its config changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ldmole_dist.config import Adapter
from ldmole_dist.method.names import ROUTER_NAMES
from ldmole_dist.tuner.config import LdMoleConfig
from ldmole_dist.tuner.targets import experts_of_linear

BASELINE = "sparsegen"  # that the others are held against, seed by seed


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        title: in a few words.
        overrides: of the run's config, "a.b=c".
    """

    title: str
    overrides: tuple[str, ...]


METHODS = {
    "sparsegen": Method("LD-MoLE (Sparsegen)", ("adapter.router=sparsegen",)),
    "sparsegen_k2": Method(
        "LD-MoLE, sparsity loss to 2", ("adapter.router=sparsegen", "optimisation.sparsity_coef=1.0")
    ),
    "sparsegen_noise": Method(
        "LD-MoLE, router noise 0.5", ("adapter.router=sparsegen", "optimisation.router_noise=0.5")
    ),
    "topk": Method("top-2 (MoLA's router)", ("adapter.router=topk", "adapter.top_k=2")),
    # ReMoE's start of 1e-8 would need a hundred steps to be felt: more than a short budget has.
    "relu": Method("ReLU, adaptive L1 to 2 (ReMoLE)", ("adapter.router=relu", "optimisation.l1_coef=0.001")),
    "softmax": Method("softmax, all experts", ("adapter.router=softmax",)),
    "top_p": Method("top-p 0.4", ("adapter.router=top_p", "optimisation.entropy_coef=0.0001")),
    "lora": Method("plain LoRA", ("adapter.router=lora",)),
}
DEFAULT = ROUTER_NAMES


def overrides_of(name: str, adapter: Adapter, backbone: str) -> list[str]:
    """The overrides of a method; of plain LoRA also the rank with which it has as many parameters as LD-MoLE.

    Args:
        name: of the method.
        adapter: that all methods start from.
        backbone: path of the frozen model.
    """
    overrides = list(METHODS[name].overrides)
    if name == "lora":
        rank = equal_rank(linears_of(backbone, adapter), adapter)
        alpha = adapter.lora_alpha / adapter.r * rank  # the same scaling
        overrides += ["adapter.num_experts=1", f"adapter.r={rank}", f"adapter.lora_alpha={alpha}"]
    return overrides


def linears_of(backbone: str, adapter: Adapter) -> list[tuple[int, int, int]]:
    """(in-features, out-features, experts) of every linear that is adapted; nothing is loaded but the backbone's config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(backbone))
    config = LdMoleConfig(num_experts=adapter.num_experts, target_modules=adapter.target_modules)
    return [
        (module.in_features, module.out_features, experts_of_linear(model, config, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
    ]


def equal_rank(linears: list[tuple[int, int, int]], adapter: Adapter) -> int:
    """The rank of a LoRA whose number of parameters is nearest to that of an LD-MoLE adapter on the same linears.

    Args:
        linears: (D, O, E) of each.
        adapter: r and hidden units of the lambda-MLP.
    """
    experts = adapter.r * sum(E * (D + O) for D, O, E in linears)
    routers = sum(E * D for D, _, E in linears)
    hidden = adapter.lambda_hidden
    lambda_mlps = sum(hidden * D + 2 * hidden + 1 for D in {D for D, _, _ in linears})
    return max(1, round((experts + routers + lambda_mlps) / sum(D + O for D, O, _ in linears)))
