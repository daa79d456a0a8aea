"""The fields of an adapter that the run config and `LdMoleConfig` share: names, defaults, ranges and help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from ldmole_dist.method.names import ROUTER_NAMES, RouterName

# The linears of a decoder layer in Llama, Qwen and Mistral models.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Positive = Annotated[int, Field(ge=1)]
# The tags make pydantic report only the errors of the alternative that matches the type of the value.
ExpertCounts = Annotated[
    Annotated[Positive, Tag("<number>")] | Annotated[list[Positive], Field(min_length=1), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<number>"),
]


@dataclass
class AdapterFields:
    """Fields that the `adapter` section of a run config and a PEFT `LdMoleConfig` have in common.

    The defaults are those of the paper, except for `lambda_init`: the authors' code corresponds to "authors", but the default
    is "live" (docs/method.md). The class is a dataclass of the standard library, so that PEFT's config can derive from it.
    pydantic checks values against the annotations.
    """

    r: Positive = field(default=8, metadata={"help": "LoRA rank of each expert."})
    lora_alpha: Annotated[float, Field(gt=0)] = field(
        default=16.0,
        metadata={"help": "Numerator of lora_alpha / r, the factor by which the output of the experts is scaled."},
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = field(
        default=0.1,
        metadata={
            "help": "Dropout probability of the input of the experts and, with router_input 'layer', of the router and the "
            "lambda-MLP. Linears that read the same input share one mask."
        },
    )
    num_experts: ExpertCounts = field(
        default=8,
        metadata={
            "help": "Number of experts of each adapted linear. A list of n numbers divides the decoder layers in order into n "
            "groups of equal size, up to rounding; each number applies to the linears of one group."
        },
    )
    target_modules: list[str] | str = field(
        default_factory=lambda: list(LINEARS),
        metadata={"help": "Names of the linears to adapt, or one regular expression that their full names must match."},
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the projections of a MoE backbone's routed experts to adapt, such as "
            "'mlp.experts.gate_up_proj' and 'mlp.experts.down_proj'; None: no routed experts."
        },
    )
    router: RouterName = field(
        default="sparsegen", metadata={"help": f"Routing function: {', '.join(ROUTER_NAMES)} (docs/method.md)."}
    )
    router_input: Literal["layer", "hidden"] = field(
        default="layer",
        metadata={
            "help": "Input of the router. 'layer': the input of the adapted linear. 'hidden', as in X-LoRA: the last hidden "
            "states of the model without the adapter, from an additional forward that needs use_cache=False."
        },
    )
    top_k: Positive = field(default=2, metadata={"help": "Number of active experts per token with router 'topk'."})
    top_p: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.4,
        metadata={"help": "Cumulative probability that the active experts must reach with router 'top_p'."},
    )
    lambda_hidden: Positive = field(default=256, metadata={"help": "Hidden size of the lambda-MLP."})
    lambda_eps: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.01, metadata={"help": "Minimum distance of lambda from 1: lambda < 1 - lambda_eps."}
    )
    lambda_init: Literal["live", "authors"] = field(
        default="live",
        metadata={
            "help": "Initial values of the lambda-MLP. 'live': about half of the hidden units are active at the start. "
            "'authors': all biases are -2.5, as in the authors' code, and nearly all hidden units are inactive."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and save with the adapter, such as 'score'."}
    )

    @property
    def expert_counts(self) -> list[int]:
        """`num_experts` as a list: one entry for each group of decoder layers, or one entry for all layers."""
        return self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]


def check_top_k(adapter: AdapterFields, prefix: str = "") -> None:
    """With router "topk", raise ValueError if `top_k` exceeds the smallest number of experts.

    Args:
        adapter: fields to check, each of which must be valid on its own.
        prefix: prefix of the keys in the error message, such as "adapter.".
    """
    smallest = min(adapter.expert_counts)
    if adapter.router == "topk" and adapter.top_k > smallest:
        entry = "the smallest entry of " if isinstance(adapter.num_experts, list) else ""
        raise ValueError(
            f"{prefix}top_k={adapter.top_k} is greater than {entry}{prefix}num_experts={adapter.num_experts}; lower "
            f"{prefix}top_k to at most {smallest}"
        )
