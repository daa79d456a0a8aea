"""A wheel holds what the package needs besides its modules."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_wheel_brings_deepspeed_configs_and_data(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("ldmole_dist", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert any(name.endswith(f".data/data/share/ldmole_dist/ds_configs/{path.name}") for name in names)
    assert {"ldmole_dist/data/wordnet/train.jsonl", "ldmole_dist/data/wordnet/LICENSE"} <= set(names)
    assert "ldmole_dist/checkpoint/save.py" in names and not any(name.startswith("tests") for name in names)
