"""The public names, the cost of importing them, and registration with PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ldmole_dist

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "peft", "transformers", "deepspeed", "numpy")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, cwd=ROOT)


def output_of(code: str) -> str:
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ldmole_dist.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert (getattr(ldmole_dist, name).__doc__ or "").strip()
    assert f"\n| `{name}` |" in (ROOT / "docs" / "api.md").read_text()


def test_public_names_are_listed_and_unknown_ones_raise() -> None:
    assert set(ldmole_dist.__all__) <= set(dir(ldmole_dist))
    assert callable(ldmole_dist.train)  # the function, although a subpackage is called training
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ldmole_dist.nothing


@pytest.mark.parametrize(
    ("statement", "also_absent"),
    [
        ("import ldmole_dist", ("pydantic",)),
        ("from ldmole_dist.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass", ("pydantic",)),
        ("from ldmole_dist.cli import main; main(['validate', 'launch/configs/quickstart.yaml', '--ranks', '2'])", ()),
        ("import ldmole_dist.cluster.entry", ("pydantic",)),
    ],
    ids=["import", "help", "validate", "supervisor"],
)
def test_heavy_packages_are_not_imported(statement: str, also_absent: tuple[str, ...]) -> None:
    names = (*HEAVY, *also_absent)
    code = f"{statement}\nimport sys\nprint('found', [name for name in {names} if name in sys.modules])"
    assert output_of(code).endswith("found []")


REGISTERED = """
import sys
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from ldmole_dist import LdMoleConfig
assert PEFT_TYPE_TO_CONFIG_MAPPING["LDMOLE"] is LdMoleConfig
assert PEFT_TYPE_TO_TUNER_MAPPING["LDMOLE"].__name__ == "LdMoleModel"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("ldmole_dist")]
assert type(sys.modules["peft"].__loader__).__module__.startswith(("importlib", "_frozen_importlib"))
print("registered")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import ldmole_dist, peft",
        "import peft, ldmole_dist",
        "import ldmole_dist.tuner.layer",
        "import threading, ldmole_dist\n"
        "names = ('peft', 'ldmole_dist.tuner.model', 'peft')\n"
        "threads = [threading.Thread(target=__import__, args=(name,)) for name in names]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
        "import importlib, ldmole_dist; importlib.reload(ldmole_dist); import peft; importlib.reload(ldmole_dist)",
    ],
    ids=["before_peft", "after_peft", "through_a_module", "in_threads", "repeatedly"],
)
def test_registration_with_peft(imports: str) -> None:
    assert output_of(imports + REGISTERED) == "registered"


def test_failing_import_of_peft_is_reported_and_a_later_one_registers(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("raise RuntimeError('damaged installation')\n")
    code = f"""
import sys, ldmole_dist
sys.path.insert(0, {str(tmp_path)!r})
try:
    import peft
except RuntimeError as error:
    assert str(error) == "damaged installation" and "peft" not in sys.modules
else:
    raise AssertionError("no error")
sys.path.pop(0)
sys.path_importer_cache.clear()
import peft
"""
    assert output_of(code + REGISTERED) == "registered"


def test_missing_peft_is_reported() -> None:
    code = "import sys, ldmole_dist\nsys.path.clear()\nfor f in sys.meta_path[1:]: sys.meta_path.remove(f)\nimport peft"
    assert "No module named 'peft'" in run_python(code).stderr
