"""A study's rows, the series and the model made of them, and the sentences that more than one section of the page has."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ldmole_dist.errors import UserError
from ldmole_dist.study.bench.latency import Latency
from ldmole_dist.study.scaling.cells import AXES
from ldmole_dist.study.scaling.prediction import predict
from ldmole_dist.study.scaling.series import Point, alike, along, apart, base_of, from_first, strong, weak
from ldmole_dist.study.scaling.sheet import Page
from ldmole_dist.study.scaling.store import Store


class Study:
    """What all sections draw from.

    Raises:
        UserError: where no cell was measured.
    """

    def __init__(self, store: Store) -> None:
        self.machine, self.rows = store.machine, store.rows()
        self.points = [Point(row.cell, row.measured) for row in self.rows if row.measured is not None]
        if not self.points:
            raise UserError(f"{store.table} holds no cell that was measured: its column status says why")
        latencies = store.latencies()
        self.latencies = latencies if isinstance(latencies, list) else []
        self.latency_failed = latencies if isinstance(latencies, str) else ""
        # Ranks on a GPU have it for themselves; on the CPU they share its cores.
        self.cores = int(self.machine["cores"]) if self.machine["device"] == "CPU" else None
        self.base = base_of(self.points)
        self.weak, self.strong = weak(self.points, self.base), strong(self.points, self.base)
        self.prediction = predict(self.points, self.cores)

    def around(self, axis: str) -> list[Point]:
        """The base cell and others that differ in this axis."""
        return along(self.points, self.base, axis)

    def alone(self, axis: str) -> list[Point]:
        """The same on one rank."""
        one = next((p.cell for p in self.weak if p.cell.ranks == 1), None)
        return along(self.points, one, axis) if one else []

    def disturbance(self) -> str:
        """What else the machine did."""
        elsewhere = [p.measured.cores_elsewhere for p in self.points]
        usual = statistics.median(elsewhere)
        said = (
            f"Other programs kept {usual:.2f} cores busy while the median cell was timed, {max(elsewhere):.2f} at worst"
        )
        meaning = ": times are longer than on an idle machine, and their ratios less certain" if usual > 0.1 else ""
        return f"{said}{meaning}."

    def resolution(self) -> str:
        """How far cells were apart that have done the same, where there were such cells: no smaller difference tells much."""
        repeated = [group for group in alike(self.points) if len(group) > 1]
        if not repeated:
            return ""
        number, widest = sum(map(len, repeated)), max(map(apart, repeated))
        return (
            f"{number} cells that sent the same differed by {widest:.1%}, which is what deciding takes in auto, and noise: a "
            "difference between others that is no larger says little."
        )

    def crowd(self) -> str:
        """What ranks beyond the cores mean, where there were any."""
        if self.cores is None or all(p.cell.ranks <= self.cores for p in self.weak):
            return ""
        return f"More than {self.cores} ranks wait for the {self.cores} cores and can be no faster than {self.cores}."


def throughput(study: Study) -> list[str]:
    """Of weak scaling, a sentence for each number of ranks and placement."""
    said = []
    for label, first, p in from_first(study.weak):
        one, many = first.measured.tokens_per_second, p.measured.tokens_per_second
        where = f", on {study.cores} cores" if study.cores and p.cell.ranks > study.cores else ""
        said.append(
            f"{plural(p.cell.ranks, 'rank')} with {label} process {many:,.0f} tokens/s{where}: {many / one:.2f} times the "
            f"{one:,.0f} of {plural(first.cell.ranks, 'rank')}."
        )
    return said


def placements(study: Study) -> list[str]:
    """Of weak scaling, a sentence for each number of ranks whose experts were spread in more than two ways."""
    said = []
    for ranks in sorted({p.cell.ranks for p in study.weak}):
        chosen = sorted((p for p in study.weak if p.cell.ranks == ranks), key=lambda p: p.cell.ep_size)
        if len(chosen) > 2:
            sizes = ", ".join(str(p.cell.ep_size) for p in chosen)
            speeds = "; ".join(f"{p.measured.tokens_per_second:,.0f}" for p in chosen)
            said.append(f"{ranks} ranks with ep_size {sizes}: {speeds} tokens/s.")
    return said


def speedup(study: Study) -> list[str]:
    """Of strong scaling, a sentence for each number of ranks and placement."""
    return [
        f"{plural(p.cell.ranks, 'rank')} with {label} take {p.measured.seconds:.2f} s, {plural(first.cell.ranks, 'rank')} "
        f"{first.measured.seconds:.2f} s: {first.measured.seconds / p.measured.seconds:.2f} times as fast."
        for label, first, p in from_first(study.strong)
    ]


def generation(latencies: Sequence[Latency]) -> list[str]:
    """What the adapter's parts are of the latency of a decoded token, a sentence for each model."""
    said = []
    for shape in dict.fromkeys(r.shape for r in latencies if r.phase == "generation"):
        chosen = [r for r in latencies if r.shape == shape and r.phase == "generation"]
        for r in chosen if len(chosen) == 1 else (chosen[0], chosen[-1]):
            shares = r.shares()
            said.append(
                f"{shape}, one token at batch {r.batch}: of {1e3 * r.whole:.1f} ms the lambda-MLP has "
                f"{shares['lambda-MLP']:.1%}, the router {shares['router']:.1%}, the experts {shares['experts']:.1%} and the "
                f"frozen model {shares['frozen model']:.1%}."
            )
    return said


def result_table(page: Page, points: Sequence[Point], axes: Sequence[str] | None = None) -> None:
    """Settings (by default those in which these points differ) and results."""
    axes = axes or [axis for axis in AXES if len({getattr(p.cell, axis) for p in points}) > 1]
    results = [
        "step, s",
        "steps from, s",
        "to, s",
        "tokens/s",
        "CPU of all ranks, s",
        "sent for experts, MB",
        "peak, MB",
    ]
    rows = []
    for cell, m in points:
        steps = f"{m.seconds:.3f}", f"{min(m.steps):.3f}", f"{max(m.steps):.3f}"
        costs = f"{m.tokens_per_second:,.0f}", f"{m.cpu_seconds:.3f}", megabytes(m.wire_bytes)
        rows.append([*(getattr(cell, axis) for axis in axes), *steps, *costs, f"{m.peak_bytes / 1e6:,.0f}"])
    page.table([*axes, *results], rows)


def megabytes(number: float) -> str:
    """Of bytes."""
    return f"{number / 1e6:.2f}"


def plural(number: int, what: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
