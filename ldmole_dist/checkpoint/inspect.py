"""Summary of a checkpoint for `ldmole checkpoint inspect`."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from ldmole_dist.checkpoint.manifest import read_manifest
from ldmole_dist.tuner.state_dict import is_expert_tensor


def print_table(checkpoint: Path) -> None:
    """Print where a checkpoint comes from, its parameters by kind, and its files.

    Raises:
        UserError: if its manifest is missing or damaged, or has another format version.
    """
    manifest = read_manifest(checkpoint)
    t, adapter = manifest.topology, manifest.config["adapter"]
    print(f"{checkpoint}: after {manifest.step} optimizer steps, format {manifest.format_version}")
    print(f"written by {t['world_size']} rank(s), ZeRO {t['zero_stage']}, ep_size {t['ep_size']}")
    experts = adapter["num_experts"]
    expert_count = f"{', '.join(map(str, experts))} (by group of layers)" if isinstance(experts, list) else experts
    print(f"backbone {manifest.backbone['path']}; experts per linear: {expert_count}; r: {adapter['r']}")
    tensors, elements = Counter[str](), Counter[str]()
    for name, shape in manifest.shapes.items():
        kind = _kind(name)
        tensors[kind] += 1
        elements[kind] += math.prod(shape)
    print(f"\n{'parameters':16} {'tensors':>8} {'elements':>14}   (each with two Adam moments, {manifest.dtype})")
    for kind in tensors:
        print(f"{kind:16} {tensors[kind]:8,} {elements[kind]:14,}")
    print(f"{'all':16} {tensors.total():8,} {elements.total():14,}")
    print(f"\n{'file':28} {'bytes':>14}   sha256")
    for name, digest in manifest.files.items():
        print(f"{name:28} {digest.bytes:14,}   {digest.sha256[:16]}…")


def _kind(name: str) -> str:
    if is_expert_tensor(name):
        return "experts"
    for part, kind in (
        (".router.", "routers"),
        ("lambda_mlp.", "lambda-MLPs"),
        (".modules_to_save.", "modules to save"),
    ):
        if part in name:
            return kind
    return "other"
