"""The comparison as a Markdown page, every number and sentence of it computed from the rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from scipy import stats  # type: ignore[import-untyped]

from ldmole_dist.study.compare.methods import BASELINE, METHODS
from ldmole_dist.study.compare.store import Row, Store

Value = Callable[[Row], float]


def page(store: Store) -> str:
    """The whole page."""
    rows, about = store.rows(), store.about
    methods = [name for name in METHODS if any(row.method == name for row in rows)]
    domains = sorted(key.removesuffix("/accuracy") for key in rows[0].after if key.endswith("/accuracy"))
    before = next((row.before for row in rows if row.before is not None), None)
    settings = ", ".join(f"{key} {about[key]}" for key in about if key not in ("command", "config", "code"))
    parts = [
        "# Routers compared",
        f"Measured by `{about['command']}`, settings in `{about['config']}`. {settings}; code {about['code']}.",
        "Mean ± standard deviation over seeds. A seed decides initial values and the order of the data, so runs of one seed "
        "see the same batches whatever the method.",
        _table(
            [
                "method",
                "runs",
                "accuracy, %",
                "evaluation loss",
                "experts per token",
                "parameters",
                "tokens/s",
                "peak, GB",
            ],
            [
                [
                    METHODS[name].title,
                    str(len(_of(rows, name))),
                    spread([percent(row, "accuracy") for row in _of(rows, name)], 1),
                    spread([row.after["eval_loss"] for row in _of(rows, name)], 3),
                    spread([row.experts_per_token for row in _of(rows, name)], 2),
                    f"{_of(rows, name)[0].parameters / 1e6:.2f} M",
                    spread([row.tokens_per_second for row in _of(rows, name)], 1),
                    spread([row.peak_memory_gb for row in _of(rows, name) if row.peak_memory_gb is not None], 2),
                ]
                for name in methods
            ],
        ),
        *([f"Before training: {percent_of(before, 'accuracy'):.1f} %."] if before else []),
        *_by_domain(rows, methods, domains, before),
        *_against_baseline(rows, methods),
    ]
    return "\n\n".join(parts) + "\n"


def _by_domain(
    rows: Sequence[Row], methods: Sequence[str], domains: Sequence[str], before: dict[str, float] | None
) -> list[str]:
    if not domains:
        return []
    body = [
        [METHODS[name].title, *(spread([percent(row, f"{d}/accuracy") for row in _of(rows, name)], 1) for d in domains)]
        for name in methods
    ]
    if before:
        body.insert(0, ["before training", *(f"{percent_of(before, f'{d}/accuracy'):.1f}" for d in domains)])
    return ["## By domain", _table(["accuracy, %", *domains], body)]


def _against_baseline(rows: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """Differences to the baseline within a seed: what the order of the data does to both cancels out."""
    others = [name for name in methods if name != BASELINE]
    paired = {name: _paired(rows, name, lambda row: percent(row, "accuracy")) for name in others}
    losses = {name: _paired(rows, name, lambda row: row.after["eval_loss"]) for name in others}
    if not any(paired.values()):
        return []
    body, said = [], []
    for name in others:
        if paired[name]:
            body.append([METHODS[name].title, spread(paired[name], 1, sign=True), spread(losses[name], 3, sign=True)])
            accuracy, loss = verdict(paired[name], 1, " points"), verdict(losses[name], 3, "")
            said.append(f"- {METHODS[name].title}: accuracy {accuracy}; loss {loss}.")
    return [
        f"## Against {METHODS[BASELINE].title}",
        "The other minus the baseline, within a seed; mean ± standard deviation over seeds. The intervals know of seeds only: "
        "another test set would move the numbers too.",
        _table(["method", "accuracy, points", "evaluation loss"], body),
        "\n".join(said),
    ]


def verdict(differences: Sequence[float], digits: int, unit: str) -> str:
    """What differences within seeds say of their mean: its 95 % interval by Student's t, and whether 0 is outside of it.

    Args:
        differences: to the baseline, one a seed.
        digits: after the point.
        unit: of the differences, with a space before; empty for none.
    """
    if len(differences) < 2:
        return "one seed, which tells nothing of the spread"
    mean = statistics.mean(differences)
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    interval = f"{mean:+.{digits}f}{unit}, 95 % interval {mean - half:+.{digits}f} to {mean + half:+.{digits}f}"
    if abs(mean) <= half or mean == 0:
        return f"not told apart ({interval})"
    return f"{'above' if mean > 0 else 'below'} the baseline ({interval})"


def spread(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """ "71.3 ± 0.8"; without a spread where there is one value, "–" where there is none."""
    if not values:
        return "–"
    plus = "+" if sign else ""
    mean = f"{statistics.mean(values):{plus}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def percent(row: Row, key: str) -> float:
    """Of the evaluation after training."""
    return percent_of(row.after, key)


def percent_of(values: dict[str, float], key: str) -> float:
    """A share as percent."""
    return 100 * values[key]


def _paired(rows: Sequence[Row], name: str, value: Value) -> list[float]:
    baseline = {row.seed: value(row) for row in _of(rows, BASELINE)}
    return [value(row) - baseline[row.seed] for row in _of(rows, name) if row.seed in baseline]


def _of(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row.method == name]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
