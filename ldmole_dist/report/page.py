"""Compose the report: summary, figures with the captions in figures.toml, and the table of domains."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from ldmole_dist.method.statistics import merge_sums, summarize
from ldmole_dist.model.saved import SavedModel
from ldmole_dist.monitor.linears import Linears
from ldmole_dist.report import by_layer, history_figures, html
from ldmole_dist.report.coactivation import MIN_EXPECTED, coactivation
from ldmole_dist.report.collect import Observed
from ldmole_dist.report.domains import domain_figure, domain_table
from ldmole_dist.report.history import RoutingHistory
from ldmole_dist.report.inputs import DataSet
from ldmole_dist.report.style import STYLE, png
from ldmole_dist.report.tokens import most_frequent, rank_correlation, tokens_figure
from ldmole_dist.tuner.config import LdMoleConfig

FIGURES: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("figures.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class ReportData:
    """Data that a report shows.

    Attributes:
        saved: Run or adapter that the report is about.
        config: Config of the adapter.
        data: Data set that was routed.
        observed: Routing of the data set.
        history: Return value of `trace_history`: routing over the course of the run, or None.
        records: Lines of the run's routing.jsonl, see `read_routing_log`.
        setup: Precision, device and speed, as text.
    """

    saved: SavedModel
    config: LdMoleConfig
    data: DataSet
    observed: Observed
    history: RoutingHistory | None
    records: Sequence[Mapping[str, Any]]
    setup: str


def summary(report: ReportData) -> list[tuple[str, str]]:
    """Return (name, value) pairs of the main results, for the page and the terminal."""
    config, data, sums = report.config, report.data, report.observed.by_linear
    linears, summaries = Linears(sums), {name: summarize(s) for name, s in sums.items()}
    total, experts = summarize(merge_sums(sums.values())), experts_text(summaries)
    loads = [(load * len(s["load"]), name, e) for name, s in summaries.items() for e, load in enumerate(s["load"])]
    by_experts = sorted(summaries, key=lambda name: summaries[name]["experts_per_token"])
    dead = sum(s["dead_experts"] for s in summaries.values())

    def of_linear(name: str) -> str:
        return f"{summaries[name]['experts_per_token']:.2f} ({linears.label(name)})"

    def of_expert(load: tuple[float, str, int]) -> str:
        return f"{load[0]:.2f} times the even share (expert {load[2]} of {linears.label(load[1])})"

    rows = [
        ("adapter", f"{report.saved.adapter}: {config.router} router, E = {experts}, r = {config.r}"),
        ("backbone", report.saved.backbone),
        ("adapted linears", f"{len(summaries)}: {len(linears.layers)} layers × {', '.join(linears.projections)}"),
        ("data", f"{data.path}: {sum(map(len, data.examples.values())):,} rows"),
        ("tokens", f"{int(report.observed.tokens_V.sum()):,} without padding"),
        ("rows at maximum length", f"{data.full:,} (maximum: {data.max_length:,} tokens)"),
        ("setup", report.setup),
        ("experts per token", f"{total['experts_per_token']:.2f} of {experts}, mean over tokens and linears"),
        ("most experts", of_linear(by_experts[-1])),
        ("fewest experts", of_linear(by_experts[0])),
        ("dead experts", f"{dead:,} of {len(loads):,}"),
        ("largest load", of_expert(max(loads))),
        ("smallest load", of_expert(min(loads))),
    ]
    if "lambda_mean" in total:
        rows.append(("λ", f"{total['lambda_mean']:.3f} ± {total['lambda_std']:.3f} over tokens and linears"))
    return rows


def sections(report: ReportData, tokenizer: PreTrainedTokenizerBase) -> list[html.Section]:
    """Draw all figures and return the sections of the page in order."""
    linears, observed, history = Linears(report.observed.together), report.observed, report.history
    summaries = {name: summarize(sums) for name, sums in observed.by_linear.items()}
    use, tokens = most_frequent(observed), int(observed.tokens_V.sum())
    correlation = rank_correlation(use.counts_N, use.experts_N)
    values = {
        "experts": experts_text(summaries),
        "shown_tokens": len(use.ids_N),
        "linears": len(summaries),
        "correlation": "undefined" if correlation is None else f"{correlation:+.2f}",
        "dead_experts": sum(s["dead_experts"] for s in summaries.values()),
        "min_expected": f"{MIN_EXPECTED:g}",
        "probe_tokens": f"{history.tokens:,}" if history else 0,
        "skipped_checkpoints": history.skipped if history else 0,
    }
    with matplotlib.rc_context(STYLE):
        figures: dict[str, Figure | None] = {
            "lambda_by_layer": by_layer.lambda_by_layer(linears, summaries) if by_layer.has_lambda(summaries) else None,
            "experts_by_layer": by_layer.experts_by_layer(linears, summaries),
            "experts_histogram": by_layer.experts_histogram(linears, summaries),
            "tokens": tokens_figure(use, tokenizer),
            "load": by_layer.load_map(linears, summaries),
            "coactivation": coactivation(linears, observed.together, tokens),
            "movement": history_figures.change_map(linears, history) if history else None,
            "movement_lines": history_figures.state_lines(linears, history) if history else None,
            "curves": history_figures.training_lines(linears, report.records) if report.records else None,
            "domains": domain_figure(linears, observed.by_domain) if report.data.has_domains else None,
        }
        content: dict[str, list[str | html.Points | html.Figure | html.Table]] = {}
        content["Summary"] = [html.Table([], summary(report))]
        for name, text in FIGURES.items():
            if figure := figures[name]:
                caption = Template(text["caption"]).substitute(values)
                content.setdefault(text["section"], []).append(html.Figure(name, text["title"], caption, png(figure)))
    if report.data.has_domains:
        rows = {domain: len(examples) for domain, examples in report.data.examples.items()}
        content["Domains"].append(domain_table(linears, observed.by_domain, rows))
    return [html.Section(title, parts) for title, parts in content.items()]


def experts_text(summaries: by_layer.Summaries) -> str:
    """Return the number of experts per linear as text: "8", or "4 to 8" if it differs between linears."""
    counts = {len(summary["load"]) for summary in summaries.values()}
    return str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
