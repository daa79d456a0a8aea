"""A part of PEFT's own tests, on LD-MoLE; `launch/nightly.sh peft` runs all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[1] / "peft_suite.py"


@pytest.mark.full
def test_peft_tests_of_custom_models_pass() -> None:
    chosen = "two or saved"  # of the kinds of models in peft_suite.rows
    command = [sys.executable, str(SUITE), "test_custom_models", "-k", chosen, "-p", "no:warnings"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    found = re.search(r"(\d+) passed", run.stdout)
    assert found is not None and int(found[1]) > 70, run.stdout[-300:]
