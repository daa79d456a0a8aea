"""The wheel works in an environment that holds nothing but the wheel and what it requires."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.small_run import make_config, make_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("ldmole_dist", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(source), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment: the wheel, and links to the packages that it requires without extras."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", str(environment), cwd=environment)
    python = environment / "bin" / "python"
    run(str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel), cwd=environment)
    site = next((environment / "lib").glob("python*/site-packages"))
    # Its metadata, and not that of the checkout's installation, says what is required.
    (own,) = importlib.metadata.distributions(path=[str(site)], name="ldmole-dist")
    for name in required(own):
        for file in importlib.metadata.distribution(name).files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(importlib.metadata.distribution(name).locate_file(top))
    return environment / "bin"


def required(distribution: importlib.metadata.Distribution) -> set[str]:
    """Names of all distributions that one needs, directly and indirectly, without its extras."""
    found: set[str] = set()
    waiting = [(distribution, frozenset[str]())]
    while waiting:
        current, extras = waiting.pop()
        for requirement in map(Requirement, current.requires or []):
            wanted = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker and not any(requirement.marker.evaluate(each) for each in wanted):
                continue
            if requirement.name not in found:
                found.add(requirement.name)
                waiting.append((importlib.metadata.distribution(requirement.name), frozenset(requirement.extras)))
    return found


def run(*command: str, cwd: Path, timeout: int = 500) -> str:
    """Run a command and return its output; without the variables that let it find the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.timeout(600)
def test_wheel_holds_configs_data_and_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert any(name.endswith(f".data/data/share/ldmole_dist/ds_configs/{path.name}") for name in names)
    assert {"ldmole_dist/data/wordnet/train.jsonl", "ldmole_dist/data/wordnet/LICENSE", "ldmole_dist/py.typed"} <= names
    assert "ldmole_dist/checkpoint/save.py" in names and not any(name.startswith("tests") for name in names)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_commands_work_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    config = str(make_config(make_folder(tmp_path)))
    empty = tmp_path / "empty"
    empty.mkdir()

    def ldmole(*arguments: str) -> str:
        return run(str(installed / "ldmole"), *arguments, cwd=empty)

    assert "COMMAND" in ldmole("--help")
    assert "is valid" in ldmole("validate", config, "--ranks", "2")
    short = ("optimisation.max_steps=1", "run.output_dir=one")
    assert "adapter:" in ldmole("train", config, *short, "parallelism.ep_size=1")
    assert "adapter:" in ldmole("launch", config, *short, "run.output_dir=two", "--ranks", "2")
    assert (empty / "two" / "adapter" / "adapter_model.safetensors").is_file()
    assert "Llama-3.1-8B" in ldmole("plan", "--backbone", "Llama-3.1-8B", "--gpus", "8", "--gpu-memory", "80GB")
    assert ldmole("generate", "two/adapter", "The colour of a rose is", "--max-new-tokens", "1")


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("command", "extra"), [(("report", "run"), "report"), (("convert", "a.gguf", "b"), "gguf")])
def test_missing_extra_is_named(installed: Path, tmp_path: Path, command: tuple[str, ...], extra: str) -> None:
    done = subprocess.run(
        [str(installed / "ldmole"), *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and f"pip install 'ldmole-dist[{extra}]'" in done.stderr
