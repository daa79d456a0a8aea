"""The page's sections on what was measured. A comparison is left out where the cells that it needs are not there."""

from __future__ import annotations

from ldmole_dist.study.bench.latency import SEQ
from ldmole_dist.study.scaling import figures
from ldmole_dist.study.scaling.series import alike, apart, replicated
from ldmole_dist.study.scaling.sheet import Page
from ldmole_dist.study.scaling.study import (
    Study,
    generation,
    megabytes,
    placements,
    plural,
    result_table,
    speedup,
    throughput,
)


def weak_scaling(study: Study, page: Page) -> None:
    """Tokens of a rank fixed."""
    if len({p.cell.ranks for p in study.weak}) < 2:
        return
    page.heading("Weak scaling")
    fixed = f"Every rank has {study.base.tokens_per_rank} tokens in an optimizer step, however many ranks there are."
    page.text(fixed, study.crowd())
    page.points(throughput(study) + placements(study))
    page.figure(figures.weak_scaling(study.weak, study.cores), "tokens per second over ranks")
    result_table(page, study.weak)


def strong_scaling(study: Study, page: Page) -> None:
    """The batch fixed."""
    if len({p.cell.ranks for p in study.strong}) < 2:
        return
    page.heading("Strong scaling")
    batch = f"The batch of an optimizer step is {study.strong[0].cell.tokens} tokens on any number of ranks."
    page.text(batch, study.crowd())
    page.points(speedup(study))
    page.figure(figures.strong_scaling(study.strong, study.cores), "seconds per optimizer step over ranks")
    result_table(page, study.strong)


def experts(study: Study, page: Page) -> None:
    """Their number and rank."""
    _by_size(study, page, "Experts and their rank", ("experts", "lora_rank"))


def backbone(study: Study, page: Page) -> None:
    """Its depth and width, and the length of sequences."""
    _by_size(study, page, "Depth and width", ("layers", "hidden", "seq"))


def _by_size(study: Study, page: Page, heading: str, axes: tuple[str, ...]) -> None:
    series = {}
    for axis in axes:
        lines = {f"{plural(study.base.ranks, 'rank')}, ep_size {study.base.ep_size}": study.around(axis)}
        if study.base.ranks > 1:
            lines = {"1 rank": study.alone(axis)} | lines
        lines = {label: points for label, points in lines.items() if len(points) > 1}
        if lines:
            series[axis] = lines
    if not series:
        return
    page.heading(heading)
    said = []
    for axis, lines in series.items():
        for label, points in lines.items():
            (low, less), (high, more) = points[0], points[-1]
            said.append(
                f"{label}, {figures.NAMES[axis]} from {getattr(low, axis)} to {getattr(high, axis)}: a step takes "
                f"{less.seconds:.2f} and {more.seconds:.2f} s, a ratio of {more.seconds / less.seconds:.2f}."
            )
    page.points(said)
    page.figure(figures.by_axis(series), f"seconds per optimizer step by {' and '.join(series)}")
    result_table(page, list({p.cell: p for lines in series.values() for line in lines.values() for p in line}.values()))


def dispatch(study: Study, page: Page) -> None:
    """What moves between ranks."""
    points = study.around("dispatch")
    if len(points) < 2:
        return
    page.heading("Dispatch")
    said = ["all_to_all moves tokens to experts, gather moves experts to tokens, auto whichever is lighter."]
    for group in alike(points):
        (cell, m), *others = group
        if others:
            names, seconds = (cell.dispatch, *(p.cell.dispatch for p in others)), [p.measured.seconds for p in group]
            said.append(
                f"{' and '.join(names)} send the same, {megabytes(m.wire_bytes)} MB for each rank and step, and take "
                f"{' and '.join(f'{s:.2f}' for s in seconds)} s: the {apart(group):.1%} between "
                "them is what deciding takes in auto, and noise."
            )
        else:
            said.append(
                f"{cell.dispatch} sends {megabytes(m.wire_bytes)} MB for each rank and step and takes {m.seconds:.2f} s."
            )
    labels = [p.cell.dispatch for p in points]
    for p in replicated(study.weak):
        if p.cell.ranks == study.base.ranks and study.base.ep_size > 1:
            said.append(
                f"With all experts on every rank nothing is dispatched and a step takes {p.measured.seconds:.2f} s."
            )
            points, labels = [*points, p], [*labels, "ep_size 1"]
    page.text(*said)
    panels = {
        "seconds per optimizer step": [p.measured.seconds for p in points],
        "sent for experts by a rank, MB a step": [p.measured.wire_bytes / 1e6 for p in points],
    }
    page.figure(figures.bars(labels, panels), "seconds and bytes by dispatch")
    result_table(page, points)
    kinds = sorted({kind for p in points for kind in p.measured.wire})
    page.text("Elements that a rank sends in an optimizer step, by kind (docs/clusters.md says what they are):")
    page.table(["kind", *labels], [[k, *(f"{p.measured.wire.get(k, 0):,.0f}" for p in points)] for k in kinds])


def stages(study: Study, page: Page) -> None:
    """ZeRO."""
    points = study.around("stage")
    if len(points) < 2:
        return
    page.heading("ZeRO stages")
    said = [f"Stage {cell.stage}: {m.seconds:.2f} s a step, peak {m.peak_bytes / 1e6:,.0f} MB." for cell, m in points]
    peak = "what is allocated on the GPU of the rank that needs most"
    if study.cores:
        peak = "what a process has in memory beyond what it had before the model, buffers of DeepSpeed included"
    page.text(*said, f"The peak is {peak}.")
    panels = {
        "seconds per optimizer step": [p.measured.seconds for p in points],
        "peak memory of a rank, MB": [p.measured.peak_bytes / 1e6 for p in points],
    }
    page.figure(figures.bars([f"ZeRO {p.cell.stage}" for p in points], panels), "seconds and memory by ZeRO stage")
    result_table(page, points)


def latency(study: Study, page: Page) -> None:
    """The adapter's parts."""
    if not study.latencies and not study.latency_failed:
        return
    page.heading("What the adapter's parts cost, in training and at generation")
    if study.latency_failed:
        page.text(f"This was not measured: {study.latency_failed}. The same command tries it again.")
        return
    page.text(
        f"One process, E = 8, r = 8, a lambda-MLP of 256. Training is a forward and backward of sequences of {SEQ} tokens",
        f"without gradient checkpointing; generation is one token for each sequence after {SEQ} in the cache.",
        "The frozen model is the same model with its adapter disabled. Each part is run on the model's own modules and inputs,",
        "lambda once for q, k, v and once for gate, up, as the layer computes it. The remainder is what the parts, measured",
        "alone, do not explain; below 0 they took longer alone. Where a model has fewer layers than its original, its",
        "vocabulary is cut in proportion. On a CPU the clock is the time that the one core computed.",
    )
    page.points(generation(study.latencies))
    page.figure(figures.latency_shares(study.latencies), "shares of the latency by part and batch")
    names = [f"{name}, %" for name in study.latencies[0].shares()]
    rows = [
        [r.shape, r.phase, r.batch, f"{1e3 * r.whole:.1f}", *(f"{100 * share:.1f}" for share in r.shares().values())]
        for r in study.latencies
    ]
    page.table(["model", "phase", "sequences", "whole, ms", *names], rows)
