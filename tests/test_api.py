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
"""
IMPORTS = {
    "before PEFT": "import ldmole_dist, peft",
    "after PEFT": "import peft, ldmole_dist",
    "through a module": "import ldmole_dist.tuner.layer",
    "in threads": """
import threading, ldmole_dist
names = ("peft", "ldmole_dist.tuner.model", "peft")
threads = [threading.Thread(target=__import__, args=(name,)) for name in names]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
""",
    "repeatedly": "import importlib, ldmole_dist; importlib.reload(ldmole_dist); import peft; importlib.reload(ldmole_dist)",
    "after an import of PEFT that failed": """
import pathlib, sys, tempfile, ldmole_dist
with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "peft.py").write_text("raise RuntimeError('damaged installation')")
    sys.path.insert(0, folder)
    try:
        import peft
    except RuntimeError as error:
        assert str(error) == "damaged installation" and "peft" not in sys.modules
    else:
        raise AssertionError("no error")
    sys.path.pop(0)
sys.path_importer_cache.clear()
import peft
""",
}
# One process imports what takes PEFT most of its time to import; each script runs in a fork of it.
IN_FORKS = """
import os, sys, torch, transformers.modeling_utils
assert "peft" not in sys.modules and "ldmole_dist" not in sys.modules
for name, script in {scripts!r}.items():
    if os.fork() == 0:
        exec(script, {{}})
        os._exit(0)
    assert os.wait()[1] == 0, name
print("all", "registered")
"""


def test_registration_with_peft() -> None:
    scripts = {name: script + "\n" + REGISTERED for name, script in IMPORTS.items()}
    assert output_of(IN_FORKS.format(scripts=scripts)).endswith("all registered")


def test_missing_peft_is_reported() -> None:
    code = "import sys, ldmole_dist\nsys.path.clear()\nfor f in sys.meta_path[1:]: sys.meta_path.remove(f)\nimport peft"
    assert "No module named 'peft'" in run_python(code).stderr
