"""The config of an LD-MoLE adapter, as PEFT keeps it beside the weights. It knows nothing of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from peft import PeftConfig

from ldmole_dist.method.routers import ROUTERS

FORMAT_VERSION = 1
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LdMolePeftType(StrEnum):
    """PEFT's own enumeration is closed; this one stands in for it."""

    LDMOLE = "LDMOLE"


@dataclass
class LdMoleConfig(PeftConfig):
    """An LD-MoLE adapter. The defaults are the paper's (METHOD.md, "The authors' settings").

    Raises:
        ValueError: a field out of its range, or an adapter written by a newer format.
    """

    r: int = field(default=8, metadata={"help": "LoRA rank of every expert."})
    lora_alpha: float = field(default=16, metadata={"help": "The experts' sum is multiplied with lora_alpha / r."})
    lora_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Dropout on the input of router, lambda-MLP and experts alike; one mask for linears with one input."
        },
    )
    num_experts: int | list[int] = field(
        default=8,
        metadata={
            "help": "Experts of every adapted linear; several numbers are spread over the decoder layers in equal stretches, "
            "the first number for the first layers."
        },
    )
    target_modules: list[str] | str | None = field(
        default_factory=lambda: list(LINEARS),
        metadata={"help": "Names (or one regular expression) of the linears to adapt."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names never adapted."})
    router: str = field(default="sparsegen", metadata={"help": f"One of {sorted(ROUTERS)}."})
    router_input: str = field(
        default="layer",
        metadata={
            "help": "'layer': routers read their linear's input; 'hidden', as in X-LoRA: all read the last hidden states of a "
            "forward without the adapter, which comes first and needs use_cache=False."
        },
    )
    top_k: int = field(default=2, metadata={"help": "Active experts per token of router 'topk'."})
    top_p: float = field(
        default=0.4, metadata={"help": "Softmax mass that router 'top_p' wants of the active experts."}
    )
    train_experts: bool = field(
        default=True,
        metadata={"help": "False: experts stay as they are (`ldmole compose`), routers and lambda-MLPs are trained."},
    )
    lambda_hidden: int = field(default=256, metadata={"help": "Hidden units of the lambda-MLP."})
    lambda_eps: float = field(default=0.01, metadata={"help": "lambda stays below 1 - lambda_eps."})
    lambda_init: str = field(
        default="live", metadata={"help": "'live': hidden units fire from the start; 'authors': every bias -2.5."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter, such as 'score'."}
    )
    init_seed: int = field(
        default=0, metadata={"help": "Initial values depend on this, the module and the expert only."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Of the adapter file."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LdMolePeftType.LDMOLE
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version} is newer than this ldmole_dist reads ({FORMAT_VERSION}): upgrade it"
            )
        for name in ("r", "top_k", "lambda_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if min(self.expert_counts, default=0) < 1:
            raise ValueError(f"num_experts={self.num_experts} must be at least 1, or a list of such numbers")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must lie in [0, 1)")
        if not 0 < self.lambda_eps <= 1:
            raise ValueError(f"lambda_eps={self.lambda_eps} must lie in (0, 1]")
        if self.router not in ROUTERS:
            raise ValueError(f"router={self.router!r} is not known: choose one of {sorted(ROUTERS)}")
        if self.router == "topk" and self.top_k > min(self.expert_counts):
            raise ValueError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}: lower it to at most {min(self.expert_counts)}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.router_input not in ("layer", "hidden"):
            raise ValueError(f"router_input={self.router_input!r} is not known: choose 'layer' or 'hidden'")
        if self.lambda_init not in ("live", "authors"):
            raise ValueError(f"lambda_init={self.lambda_init!r} is not known: choose 'live' or 'authors'")

    @property
    def expert_counts(self) -> list[int]:
        """Experts of a linear in each of the stretches of decoder layers; one number where all have the same."""
        return self.num_experts if isinstance(self.num_experts, list) else [self.num_experts]
