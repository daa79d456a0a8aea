"""Compose the page of a comparison: page.md has the text, and its tables are computed from the finished runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.resources import files
from string import Template

from scipy import stats  # type: ignore[import-untyped]

from ldmole_dist.study.compare.methods import BASELINE, METHODS
from ldmole_dist.study.compare.rows import Row
from ldmole_dist.study.folder import StudyFolder
from ldmole_dist.study.table import Rows, markdown_table


def page(study: StudyFolder[Row]) -> str:
    """Return the page as Markdown.

    Args:
        study: folder of the comparison, with at least one row.
    """
    rows, about = study.rows(), study.about
    by_method = {name: [row for row in rows if row.method == name] for name in METHODS}
    by_method = {name: runs for name, runs in by_method.items() if runs}
    tables = {
        "results": result_rows(by_method),
        "domains": domain_rows(by_method),
        "differences": difference_rows(by_method),
    }
    settings = ", ".join(f"{key} {about[key]}" for key in about if key not in ("command", "config"))
    template = Template(files(__package__).joinpath("page.md").read_text(encoding="utf-8"))
    return template.substitute(
        {name: markdown_table(table) if table else "Not measured." for name, table in tables.items()},
        command=about["command"],
        config=about["config"],
        settings=settings,
        baseline=METHODS[BASELINE].title,
    )


def result_rows(by_method: dict[str, list[Row]]) -> Rows:
    """Return one table row per method: number of runs, and mean and standard deviation of the results over seeds.

    Args:
        by_method: name of a method -> its finished runs, at least one.
    """
    return [
        {
            "method": METHODS[name].title,
            "runs": len(runs),
            "accuracy %": spread([100 * row.after["accuracy"] for row in runs], 1),
            "evaluation loss": spread([row.after["eval_loss"] for row in runs], 3),
            "experts per token": spread([row.experts_per_token for row in runs], 2),
            "parameters": f"{runs[0].parameters / 1e6:.2f} M",
            "tokens/s": spread([row.tokens_per_second for row in runs], 1),
            "peak GB": spread([row.peak_memory_gb for row in runs if row.peak_memory_gb is not None], 2),
        }
        for name, runs in by_method.items()
    ]


def domain_rows(by_method: dict[str, list[Row]]) -> Rows:
    """Return table rows of the accuracy in each domain and over all domains: one before training, then one per method.

    The row of a method has the mean and the standard deviation over seeds.

    Args:
        by_method: name of a method -> its finished runs, at least one.
    """
    rows = [row for runs in by_method.values() for row in runs]
    keys = sorted(key for key in rows[0].after if key.endswith("accuracy"))
    evaluations = {"before training": [row.before for row in rows if row.before is not None][:1]}
    evaluations |= {METHODS[name].title: [row.after for row in runs] for name, runs in by_method.items()}
    return [
        {
            "accuracy %": title,
            **{key.rpartition("/")[0] or "all": spread([100 * e[key] for e in each], 1) for key in keys},
        }
        for title, each in evaluations.items()
    ]


def difference_rows(by_method: dict[str, list[Row]]) -> Rows:
    """Return one table row per method except the baseline, with its differences from the baseline.

    Differences are between runs with the same seed: mean, standard deviation and, for two or more seeds, the 95 %
    confidence interval of the mean. Methods that have no seed in common with the baseline are left out.

    Args:
        by_method: name of a method -> its finished runs.
    """
    quantities: dict[str, tuple[Callable[[Row], float], int]] = {
        "accuracy, points": (lambda row: 100 * row.after["accuracy"], 1),
        "evaluation loss": (lambda row: row.after["eval_loss"], 3),
    }
    baseline = {row.seed: row for row in by_method.get(BASELINE, [])}
    rows = []
    for name, runs in by_method.items():
        pairs = [(run, baseline[run.seed]) for run in runs if run.seed in baseline]
        if name != BASELINE and pairs:
            row: dict[str, object] = {"method": METHODS[name].title}
            for quantity, (value, digits) in quantities.items():
                differences = [value(run) - value(base) for run, base in pairs]
                row |= {quantity: spread(differences, digits, sign=True), f"{quantity}: 95 % interval": "–"}
                if len(differences) > 1:
                    low, high = interval(differences)
                    row[f"{quantity}: 95 % interval"] = f"{low:+.{digits}f} to {high:+.{digits}f}"
            rows.append(row)
    return rows


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean, by Student's t-distribution.

    Args:
        differences: at least two values.
    """
    error = float(stats.sem(differences))
    half = error * float(stats.t.ppf(0.975, len(differences) - 1))
    mean = statistics.mean(differences)
    return mean - half, mean + half


def spread(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """Return "mean ± standard deviation" as text; the mean alone for one value, "–" for none.

    Args:
        values: values to summarize.
        digits: number of digits after the decimal point.
        sign: whether to write a plus sign before a positive mean.
    """
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
