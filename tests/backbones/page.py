"""docs/models.md: what LD-MoLE adapts in each architecture."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ldmole_dist.tuner.expert_targets import routed_experts, why_experts_not_adaptable
from tests.backbones.known import known_failures
from tests.backbones.ld_mole_checks import LdMoleTrial
from tests.backbones.sizes import Architecture
from tests.backbones.tiny import ARCHITECTURES, UNAVAILABLE

PAGE = "docs/models.md"
HEAD = """# Models

The tests inject an adapter with `target_modules="all-linear"` into tiny random models of these architectures of
transformers 5.23, beside PEFT's LoRA on the same linears. They check outputs and gradients, padding, gradient checkpointing,
bfloat16 backbones, generation with a key-value cache, saving and loading, and which linears share an input. What LoRA trains,
LD-MoLE trains, except where a note says otherwise. This command writes the page:

<!-- no-test: takes minutes; tests/backbones compares rows of this page -->
```bash no-test
.venv/bin/python -m tests.backbones
```

Adapted linears and routed experts are shares of the weights of the architecture's default configuration in transformers; a
question mark stands for a default that transformers cannot make a model of. Fused routed experts are single parameters for all
experts of a layer, not linears: `all-linear` does not adapt them, and `target_parameters` adapts those marked "yes". Groups are
the sets of several linears that read one input and share a dispatch, in the tiny model, and the linears in them, of all adapted
linears.

| architecture | adapted | routed experts | by `target_parameters` | groups | notes |
| --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    """Return the page."""
    rows = [row(name, architecture) for name, architecture in ARCHITECTURES.items()]
    missing = [f"| {name} | | | | | not tested: {reason} |" for name, reason in UNAVAILABLE.items()]
    return HEAD + "\n".join(rows + missing) + "\n"


def row(name: str, architecture: Architecture) -> str:
    """Return the row of one architecture."""
    trial = LdMoleTrial(architecture)
    linears, experts = _shares(architecture)
    kinds = routed_experts(trial.model.get_base_model())
    refused = any(why_experts_not_adaptable(module) for module in kinds.values())
    adaptable = ("no" if refused else "yes") if kinds else ""
    groups = f"{len(trial.groups)} ({sum(map(len, trial.groups))} of {len(trial.adapted)})"
    notes = [f"needs `exclude_modules={architecture.exclude}`"] if architecture.exclude else []
    notes += dict.fromkeys(known_failures(name).values())
    return f"| {name} | {linears} | {experts} | {adaptable} | {groups} | {'; '.join(notes)} |"


def _shares(architecture: Architecture) -> tuple[str, str]:
    """Return the shares of the weights that are in adapted linears and in routed experts."""
    try:
        with torch.device("meta"):
            model = architecture.auto.from_config(type(architecture.settings())())
    except Exception:  # some defaults of transformers are incomplete
        return "?", "?"
    weights = sum(parameter.numel() for parameter in model.parameters())
    linears = sum(weight.numel() for weight in {module.weight for module in adapted(model, architecture).values()})
    experts = sum(p.numel() for module in routed_experts(model).values() for p in module.parameters(recurse=False))
    return f"{linears / weights:.0%}", f"{experts / weights:.0%}" if experts else ""


def adapted(model: Any, architecture: Architecture) -> dict[str, nn.Module]:
    """Return the linears that an adapter with `target_modules="all-linear"` adapts."""
    output = model.get_output_embeddings()
    # PEFT trains the head of a sequence classifier as a whole.
    heads = ["classifier", "score"] if architecture.task == "SEQ_CLS" else []
    left_out = [*heads, *(architecture.exclude or [])]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not name.endswith(tuple(left_out))
    }
