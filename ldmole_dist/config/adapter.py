"""The fields of an adapter: names, defaults, ranges and help, for the run config and for `LdMoleConfig` alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from ldmole_dist.method.names import ROUTER_NAMES, RouterName

# The linears of a decoder layer in Llama, Qwen and Mistral models.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Positive = Annotated[int, Field(ge=1)]
# With tags, pydantic reports only the errors of the alternative that was meant.
ExpertCounts = Annotated[
    Annotated[Positive, Tag("<number>")] | Annotated[list[Positive], Field(min_length=1), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<number>"),
]


@dataclass
class AdapterFields:
    """Fields that the `adapter` section of a run config and a PEFT `LdMoleConfig` have in common.

    A dataclass of the standard library, so that PEFT's config can derive from it; pydantic checks the annotations. The
    defaults are those of the paper.
    """

    r: Positive = field(default=8, metadata={"help": "LoRA rank of each expert."})
    lora_alpha: Annotated[float, Field(gt=0)] = field(
        default=16.0, metadata={"help": "Scale of the experts' output, as lora_alpha / r."}
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = field(
        default=0.1,
        metadata={
            "help": "Dropout probability on the input of router, lambda-MLP and experts. Linears that read the same input "
            "share one mask."
        },
    )
    num_experts: ExpertCounts = field(
        default=8,
        metadata={
            "help": "Experts of each adapted linear. A list is assigned to the decoder layers in order, each entry to an equal "
            "share of them."
        },
    )
    target_modules: list[str] | str = field(
        default_factory=lambda: list(LINEARS),
        metadata={"help": "Names of the linears to adapt, or one regular expression for their full names."},
    )
    router: RouterName = field(
        default="sparsegen", metadata={"help": f"Routing function: {', '.join(ROUTER_NAMES)} (docs/method.md)."}
    )
    router_input: Literal["layer", "hidden"] = field(
        default="layer",
        metadata={
            "help": "Input of the routers. 'layer': the input of their linear. 'hidden', as in X-LoRA: the last hidden states "
            "of a forward without the adapter, which runs first and needs use_cache=False."
        },
    )
    top_k: Positive = field(default=2, metadata={"help": "Active experts per token with router 'topk'."})
    top_p: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.4,
        metadata={"help": "Cumulative probability that the active experts must reach with router 'top_p'."},
    )
    lambda_hidden: Positive = field(default=256, metadata={"help": "Hidden size of the lambda-MLP."})
    lambda_eps: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.01, metadata={"help": "Distance that lambda keeps from 1: lambda < 1 - lambda_eps."}
    )
    lambda_init: Literal["live", "authors"] = field(
        default="live",
        metadata={
            "help": "Initial biases of the lambda-MLP. 'live': hidden units are active from the start; 'authors': all -2.5, as "
            "in the authors' code."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and save with the adapter, such as 'score'."}
    )

    @property
    def expert_counts(self) -> list[int]:
        """`num_experts` as a list: one entry for each group of decoder layers, or one for all."""
        return self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]


def check_top_k(adapter: AdapterFields, prefix: str = "") -> None:
    """Raise ValueError if router "topk" would activate more experts than the smallest layer has.

    Args:
        adapter: whose single fields are valid.
        prefix: of the keys in the message, such as "adapter.".
    """
    smallest = min(adapter.expert_counts)
    if adapter.router == "topk" and adapter.top_k > smallest:
        raise ValueError(
            f"{prefix}top_k={adapter.top_k} is greater than {prefix}num_experts={adapter.num_experts}; lower it to at most "
            f"{smallest}"
        )
