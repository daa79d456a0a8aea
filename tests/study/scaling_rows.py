"""Rows for the tests of the scaling study: invented ones, and those of a recorded study."""

from pathlib import Path
from typing import Any

from ldmole_dist.study.folder import StudyFolder
from ldmole_dist.study.scaling import grids
from ldmole_dist.study.scaling.cells import Cell
from ldmole_dist.study.scaling.measure import Measured
from ldmole_dist.study.scaling.rows import Row, stored_row

RECORDED = Path(__file__).with_name("recorded_study")  # launch/scaling_study.py --output tests/study/recorded_study
TINY = Cell(ranks=1, ep_size=1, hidden=64, layers=1, experts=4, lora_rank=2, micro_batch=1, seq=16)
MACHINE = dict(device="CPU", processor="any", cores="2", torch="1", code="abc", warmup_steps="4", timed_steps="7")
GRID = grids.grid_named("quick", "fp32")


def measured(seconds: float, **other: Any) -> Measured:
    values: dict[str, Any] = dict(
        seconds=seconds,
        steps=[seconds],
        cpu_seconds=seconds,
        cores_elsewhere=0.0,
        peak_bytes=1,
        experts_per_token=3.0,
        wire_bytes=20.0,
        tokens_per_second=1 / seconds,
    )
    return Measured(**values | other)


def study(folder: Path, about: dict[str, str] | None = None) -> StudyFolder[Row]:
    """Open the folder of a scaling study; without `about`, an existing one."""
    return StudyFolder(folder, about, stored_row)
