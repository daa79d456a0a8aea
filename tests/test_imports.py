"""Imports point one way: a module imports from its own room and from the rooms below it (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ldmole_dist"

# Every room, from the bottom up. Of our own rooms, method and parallel import only each other, so that they can be read beside
# the paper without knowing the rest.
ROOMS = [
    "errors",
    "cli_arguments",
    "method",
    "parallel",
    "config",
    "io",
    "loss",
    "distributed",
    "data",
    "tuner",
    "hf_trainer",
    "engine",
    "model",
    "cluster",
    "checkpoint",
    "monitor",
    "selftest",
    "generation",
    "compose",
    "evaluation",
    "training",
    "planner",
    "report",
    "study",
    "cli",
]
FLOOR = {room: height for height, room in enumerate(ROOMS)}
ISOLATED = ("method", "parallel")
FOREIGN = {"torch.distributed", "deepspeed", "transformers", "peft"}
FORBIDDEN = {"method": FOREIGN, "parallel": FOREIGN - {"torch.distributed"}}
# Internals of the DeepSpeed engine, and the attributes that ZeRO sets on parameters.
ENGINE_STATE = re.compile(
    r"engine\.deepspeed\b|\bds_(?:tensor|numel|shape|status|id|process_group)\b|_z3_optimizer|_hp_mapping"
)


def imported(source: str) -> Iterator[str]:
    """Yield every module, or name in a module, that the source imports, at the top or in a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> str:
    """Return the room of a module: "method" for "method/layer.py"."""
    return module.removesuffix(".py").split("/")[0]


def violations(module: str, source: str) -> list[str]:
    """Return the forbidden imports and names of a module such as "method/layer.py"."""
    room = room_of(module)
    if room == "__init__":
        return []
    if room not in FLOOR:
        return [f"{module} is in no room of ROOMS"]
    forbidden = FORBIDDEN.get(room, set()) | (set() if room == "engine" else {"deepspeed"})
    found = [
        f"{module} imports {name}"
        for name in imported(source)
        if name.startswith(".")  # a relative import hides the room
        or any(inside(name, package) for package in forbidden)
        or (inside(name, "ldmole_dist") and not below(room, name))
    ]
    if room != "engine":
        found += [f"{module} reads {match}: ask engine/training_state.py" for match in ENGINE_STATE.findall(source)]
    return found


def below(room: str, name: str) -> bool:
    """Return whether a module of `room` may import `name`, such as "ldmole_dist.parallel.wire"."""
    if name == "ldmole_dist":  # the package itself, for its version and its folder; its public names are for users
        return True
    other = name.split(".")[1]
    apart = room in ISOLATED and other not in ISOLATED
    return other in FLOOR and FLOOR[other] <= FLOOR[room] and not apart


MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_no_import_points_up(module: str) -> None:
    assert violations(module, (PACKAGE / module).read_text()) == []


@pytest.mark.parametrize("room", ROOMS)
def test_architecture_page_names_the_room(room: str) -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    picture = page.split("```")[1]
    assert re.search(rf"\b{room}\b", picture), f"docs/architecture.md: add {room} to the picture"


def test_modules_are_found() -> None:
    assert {"method/layer.py", "parallel/dispatch.py", "engine/build.py", "tuner/model.py"} <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("method/x.py", "import torch.distributed as dist"),
        ("method/x.py", "from torch import distributed"),
        ("method/x.py", "import torch\ndef f():\n    return torch.distributed.get_rank()"),
        ("method/x.py", "from transformers import LlamaConfig"),
        ("method/x.py", "from ldmole_dist.parallel.exchange import all_to_all"),
        ("method/x.py", "from ldmole_dist.errors import UserError"),
        ("parallel/x.py", "from peft import PeftModel"),
        ("parallel/x.py", "from ldmole_dist.config import Config"),
        ("parallel/x.py", "def f():\n    from ldmole_dist.engine import build"),
        ("tuner/model.py", "from ldmole_dist.engine.experts import expert_parallel"),
        ("model/backbone.py", "import ldmole_dist.training.trainer"),
        ("engine/x.py", "from ldmole_dist.checkpoint import load_checkpoint"),
        ("config/x.py", "from ldmole_dist.tuner.model import LdMoleConfig"),
        ("training/trainer.py", "import deepspeed"),
        ("training/trainer.py", "from deepspeed.accelerator import get_accelerator"),
        ("training/trainer.py", "from ldmole_dist import cli"),
        ("training/trainer.py", "from .engine import build"),
        ("new_room/x.py", ""),
        ("training/trainer.py", "from ldmole_dist.new_room import x"),
        ("training/trainer.py", "from ldmole_dist import LdMoleConfig"),
        ("training/run.py", "def f(engine):\n    return engine.deepspeed.global_steps"),
        ("model/x.py", "def f(p):\n    return getattr(p, 'ds_numel', 0)"),
        ("evaluation/x.py", "from ldmole_dist.training.run import prepare"),
        ("monitor/x.py", "from ldmole_dist.evaluation.evaluator import Evaluator"),
    ],
)
def test_forbidden_imports_are_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "method/x.py",
            "import torch\nfrom torch import Tensor, nn\nfrom ldmole_dist.method.losses import router_z_loss",
        ),
        ("parallel/x.py", "import torch.distributed as dist\nfrom ldmole_dist.method.layer import Dispatch"),
        ("engine/x.py", "import deepspeed\nfrom ldmole_dist.config import Config"),
        ("training/trainer.py", "from ldmole_dist.engine.build import Engine\nfrom ldmole_dist.monitor import writer"),
        ("cli.py", "def f():\n    from ldmole_dist.training.trainer import Trainer"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations(module, source) == []
