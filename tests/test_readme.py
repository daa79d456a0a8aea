"""Every command of the README runs, from the quickstart on, in a fresh copy of the repository."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shell(command: str, timeout: int) -> str:
    """Run a command as a reader would, from the repository's root."""
    # The tests' own settings must not leak into what a reader runs.
    environment = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}\n{output[-4000:]}"
    return output


@pytest.fixture(scope="module")
def quickstart() -> str:
    return shell("bash launch/quickstart.sh", timeout=1500)


def test_the_first_two_commands_are_the_promised_ones() -> None:
    assert blocks("bash")[0].splitlines() == ["bash launch/quickstart.sh", "bash launch/test.sh"]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_quickstart_lifts_accuracy_to_85_percent(quickstart: str) -> None:
    run = ROOT / "runs" / "quickstart"
    before, *_, after = [json.loads(line)["accuracy"] for line in (run / "evaluations.jsonl").open()]
    assert 0.5 < before < 0.65 and after >= 0.85
    assert "TensorBoard" in quickstart and "generate" in quickstart
    assert (run / "adapter" / "adapter_model.safetensors").exists() and list((run / "tensorboard").iterdir())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    promised = "step loss loss_task loss_balance loss_sparsity grad_norm lr tokens_per_second experts_per_token"
    assert set(promised.split()) | {"lambda_mean", "wire_elements"} <= metrics[0].keys()
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1)) and metrics[0]["wire_elements"] > 0


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("command", [line for block in blocks("bash")[1:] for line in block.splitlines()])
def test_command(quickstart: str, command: str) -> None:
    if " checkpoint export " in command:  # it overwrites nothing, not even what an earlier test left
        shutil.rmtree(ROOT / command.split()[-1], ignore_errors=True)
    output = shell(command, timeout=1200)
    if " generate " in command:
        assert "Category: animal" in output


@pytest.mark.full
@pytest.mark.parametrize("code", blocks("python"))
def test_python(quickstart: str, code: str, tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text(code)
    shell(f".venv/bin/python '{script}'", timeout=300)
