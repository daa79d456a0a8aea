"""Imports go one way: method, parallel, the rooms on them, engine, what uses the engine, cli (DESIGN: rules)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ldmole_dist"

# A room may import from its own floor and from those below it; what is on the ground floor, everybody but method and
# parallel, which stay readable beside the paper.
FLOORS = [
    ["errors", "config", "stop", "pulse", "leave"],
    ["method"],
    ["parallel"],
    ["peft_config", "peft_method", "input_groups", "backbone", "objective", "data", "subject"],
    ["engine"],
    [
        "cluster",
        "checkpoint",
        "compose",
        "diagnose",
        "evaluation",
        "generation",
        "hf_trainer",
        "monitor",
        "ranks",
        "reading",
        "selftest",
        "study",
        "trainer",
        "training",
    ],
    ["cli"],
]
PACKAGES_OWN = "peft_method"  # whose config ldmole_dist/__init__.py gives out
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FOREIGN = {"torch.distributed", "deepspeed", "transformers", "peft"}
FORBIDDEN = {"method": FOREIGN, "parallel": FOREIGN - {"torch.distributed"}}


def imported(source: str) -> Iterator[str]:
    """Every module, or name in a module, that the source imports anywhere, functions included."""
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
    """ "method" for "method/layer.py"."""
    room = module.removesuffix(".py").split("/")[0]
    return PACKAGES_OWN if room == "__init__" else room


def violations(module: str, source: str) -> list[str]:
    """What a module, such as "method/layer.py", imports and must not."""
    room = room_of(module)
    if room not in FLOOR:
        return [f"{module} stands on no floor"]
    forbidden = FORBIDDEN.get(room, set()) | (set() if room == "engine" else {"deepspeed"})
    return [
        f"{module} imports {name}"
        for name in imported(source)
        if name.startswith(".")  # says not where from
        or any(inside(name, package) for package in forbidden)
        or (inside(name, "ldmole_dist") and not below(room, name))
    ]


def below(room: str, name: str) -> bool:
    other = name.split(".")[1] if "." in name else PACKAGES_OWN
    if other == "LdMoleConfig":
        other = PACKAGES_OWN
    apart = room in ("method", "parallel") and other in FLOORS[0]
    return other in FLOOR and FLOOR[other] <= FLOOR[room] and not apart


MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_points_back(module: str) -> None:
    assert violations(module, (PACKAGE / module).read_text()) == []


def test_every_room_was_walked() -> None:
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
        ("config.py", "from ldmole_dist.tuner.model import LdMoleConfig"),
        ("training/trainer.py", "import deepspeed"),
        ("training/trainer.py", "from deepspeed.accelerator import get_accelerator"),
        ("training/trainer.py", "from ldmole_dist import cli"),
        ("training/trainer.py", "from .engine import build"),
        ("new_room/x.py", ""),
        ("training/trainer.py", "from ldmole_dist.new_room import x"),
    ],
)
def test_the_walk_finds_what_is_forbidden(module: str, source: str) -> None:
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
        ("training/trainer.py", "from ldmole_dist.engine.build import Engine\nfrom ldmole_dist import LdMoleConfig"),
        ("cli.py", "def f():\n    from ldmole_dist.training.trainer import Trainer"),
    ],
)
def test_the_walk_lets_through_what_is_allowed(module: str, source: str) -> None:
    assert violations(module, source) == []
