"""The report's page: key numbers, then the figures in the order of the questions that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ldmole_dist.method.statistics import added, summarize
from ldmole_dist.model.saved import SavedModel
from ldmole_dist.monitor.linears import Linears
from ldmole_dist.report.by_layer import (
    counts_said,
    experts_by_layer,
    experts_histogram,
    has_lambda,
    lambda_by_layer,
    load_map,
    spread,
)
from ldmole_dist.report.coactivation import coactivation
from ldmole_dist.report.collect import Observed
from ldmole_dist.report.course import curves, movement_lines, movement_map
from ldmole_dist.report.domains import domain_figure, domain_table
from ldmole_dist.report.html import Figure, Section, Table, page
from ldmole_dist.report.inputs import DataSet
from ldmole_dist.report.movement import Movement
from ldmole_dist.report.tokens import tokens_figure
from ldmole_dist.tuner.config import LdMoleConfig


@dataclass(frozen=True)
class Material:
    """Everything that a report says.

    Attributes:
        saved: run or adapter.
        config: of the adapter.
        data: what went through it.
        observed: what the routers did.
        movement: over the run's checkpoints, if there are any.
        curves: lines of the run's routing.jsonl.
        how: device and precision.
    """

    saved: SavedModel
    config: LdMoleConfig
    data: DataSet
    observed: Observed
    movement: Movement | None
    curves: Sequence[Mapping[str, Any]]
    how: str


def key_numbers(material: Material) -> list[tuple[str, str]]:
    """(what, value) for the summary and the terminal."""
    saved, config, data, observed = material.saved, material.config, material.data, material.observed
    sums = observed.by_linear
    linears, of = Linears(sums), {name: summarize(s) for name, s in sums.items()}
    whole, experts = summarize(added(sums.values())), counts_said(of)
    loads = [(load * len(s["load"]), name, e) for name, s in of.items() for e, load in enumerate(s["load"])]
    by_experts = sorted(of, key=lambda name: of[name]["experts_per_token"])

    def expert(load: tuple[float, str, int]) -> str:
        return f"expert {load[2]} of {linears.label(load[1])}, {load[0]:.2f} times the even share of its linear's active pairs"

    def linear(name: str) -> str:
        return f"{of[name]['experts_per_token']:.2f} in {linears.label(name)}"

    dead = sum(s["dead_experts"] for s in of.values())
    rows = sum(map(len, data.examples.values()))
    cut = f"; {data.full:,} rows have the {data.max_length:,} tokens that longer ones are cut to" if data.full else ""
    return [
        ("adapter", f"{saved.adapter}: {config.router} router, E = {experts} experts of rank r = {config.r}"),
        ("backbone", saved.backbone),
        ("adapted linears", f"{len(of)}: {len(linears.layers)} layers × {', '.join(linears.projections)}"),
        ("data", f"{data.path}: {rows:,} rows, {int(observed.tokens_V.sum()):,} tokens without padding{cut}"),
        ("run with", material.how),
        ("experts per token", f"{whole['experts_per_token']:.2f} of {experts} in the mean over tokens and linears"),
        ("most and fewest", f"{linear(by_experts[-1])}; {linear(by_experts[0])}"),
        *(
            [("λ", f"{spread(whole)} (mean ± standard deviation over tokens and linears)")]
            if "lambda_mean" in whole
            else []
        ),
        ("dead experts", f"{dead:,} of {len(loads):,} are used by no token of this data"),
        ("most loaded", expert(max(loads))),
        ("least loaded", expert(min(loads))),
    ]


def sections(material: Material, tokenizer: PreTrainedTokenizerBase) -> list[Section]:
    """Draw everything."""
    observed, data = material.observed, material.data
    linears = Linears(observed.together)
    of = {name: summarize(sums) for name, sums in observed.by_linear.items()}
    how_many = [figure(linears, of) for figure in (experts_by_layer, experts_histogram)]
    if has_lambda(of):
        how_many.insert(0, lambda_by_layer(linears, of))
    together = coactivation(linears, observed.together, int(observed.tokens_V.sum()))
    drawn = [
        Section("Summary", [Table([], key_numbers(material))]),
        Section("How many experts", how_many),
        Section("Which tokens", [tokens_figure(observed, tokenizer)]),
        Section(
            "Which experts", [load_map(linears, of), together or "There is one expert: none that it could be with."]
        ),
        Section("Over the run", _over_the_run(material, linears)),
    ]
    if data.has_domains:
        rows = {domain: len(examples) for domain, examples in data.examples.items()}
        of_domains = observed.by_domain
        drawn.append(
            Section("By domain", [domain_figure(linears, of_domains), domain_table(linears, of_domains, rows)])
        )
    return drawn


def _over_the_run(material: Material, linears: Linears) -> list[str | Figure]:
    parts: list[str | Figure] = []
    if material.movement is not None:
        parts += [movement_map(linears, material.movement), movement_lines(linears, material.movement)]
    if material.curves:
        parts.append(curves(linears, material.curves))
    return parts or ["There is no run with checkpoints, and none with a record of its routing (routing.jsonl)."]


def render(material: Material, drawn: Sequence[Section], written: str) -> str:
    """The document.

    Args:
        material: of the report.
        drawn: its sections.
        written: when and by what, for the last line.
    """
    lead = "What the routers of an LD-MoLE adapter do: how many experts each token uses, which ones, and which tokens use more."
    return page(f"Routing report: {material.saved.name}", lead, drawn, written)
