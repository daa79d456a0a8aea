"""Tiny random models of many architectures, by name."""

from __future__ import annotations

from tests.backbones import decoders, encoders, multimodal
from tests.backbones.sizes import Architecture

ARCHITECTURES: dict[str, Architecture] = dict(
    sorted((decoders.architectures() | encoders.architectures() | multimodal.architectures()).items())
)
# Architectures that cannot be made here, with the reason.
UNAVAILABLE = {"gemma3n-mm-textonly": "its vision tower needs the package timm"}
