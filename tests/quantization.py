"""Packages of the tests with quantized backbones."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def need(package: str) -> None:
    """Skip the test if a package is not installed; fail it instead if LDMOLE_NEED_QUANTIZATION is set, as in CI."""
    if find_spec(package) is None:
        message = f"{package} is not installed (CONTRIBUTING.md says how to run these tests)"
        if os.environ.get("LDMOLE_NEED_QUANTIZATION"):
            pytest.fail(message)
        pytest.skip(message)
