"""What the tests of the scaling study share: rows that nobody measured, and those of a recorded study."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldmole_dist.report import html
from ldmole_dist.study.scaling import grids
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.measure import Measured
from ldmole_dist.study.scaling.sheet import Page
from ldmole_dist.study.scaling.store import Row, Store
from ldmole_dist.study.scaling.study import Study

RECORDED = Path(__file__).with_name("recorded_study")  # launch/scaling_study.py --output tests/study/recorded_study
TINY = Cell(ranks=1, ep_size=1, hidden=64, layers=1, experts=4, lora_rank=2, micro_batch=1, seq=16)
MACHINE = {
    "device": "CPU",
    "processor": "any",
    "cores": "2",
    "torch": "1",
    "code": "abc",
    "warmup_steps": "4",
    "timed_steps": "7",
}
GRID = grids.quick("fp32")


def measured(seconds: float, **other: Any) -> Measured:
    values: dict[str, Any] = dict(
        seconds=seconds,
        steps=[seconds],
        cpu_seconds=seconds,
        cores_elsewhere=0.0,
        peak_bytes=1,
        experts_per_token=3.0,
        wire={"rows": 5.0},
        wire_bytes=20.0,
        tokens_per_second=1 / seconds,
    )
    return Measured(**values | other)


def recorded(tmp_path: Path, keep: Callable[[Row], bool] = lambda row: True) -> Store:
    """A copy of the recorded study with some of its rows."""
    for name in ("machine.json", "latency.json"):
        shutil.copy(RECORDED / name, tmp_path)
    machine = json.loads((tmp_path / "machine.json").read_text())
    store = Store(tmp_path, machine)
    for row in Store(RECORDED, None).rows():
        if keep(row):
            store.add(row)
    return store


def said_by(study: Study, *chosen: Callable[[Study, Page], None]) -> str:
    """What some sections of the page say, without its plots."""
    page = Page()
    for section in chosen:
        section(study, page)
    return html.page("title", "lead", page.sections, "footer")
