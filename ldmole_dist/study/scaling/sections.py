"""The page from top to bottom: what it says before and after the measured results, and the order of all sections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from ldmole_dist.study.scaling import figures, results
from ldmole_dist.study.scaling.cells import ANSWERS, AXES, LAMBDA_HIDDEN, VOCABULARY, Cell
from ldmole_dist.study.scaling.prediction import SEEN, Prediction, rate
from ldmole_dist.study.scaling.sheet import Page
from ldmole_dist.study.scaling.study import Study, generation, result_table, throughput


def summary(study: Study, page: Page) -> None:
    """For a reader in a hurry."""
    m, failed = study.machine, len(study.rows) - len(study.points)
    said = [
        f"{len(study.points)} configurations were trained on {m['device']} ({m['processor']}, {m['cores']} cores); "
        f"{failed} failed.",
        study.disturbance(),
    ]
    if resolution := study.resolution():
        said.append(resolution)
    said += throughput(study) + generation(study.latencies)
    if study.latency_failed:
        said.append(f"What the adapter's parts cost was not measured: {study.latency_failed}.")
    if isinstance(study.prediction, str):
        said.append(f"No model was fitted: {study.prediction}.")
    else:
        said += [
            f"A model fitted to the other cells is off by {e.median:.0%} in the median and {e.worst:.0%} at worst on the "
            f"{e.cells} held-out cells with {kind}."
            for kind, e in study.prediction.errors().items()
            if kind != SEEN
        ]
    page.heading("Summary")
    page.points(said)


def method(study: Study, page: Page) -> None:
    """What was done, on what."""
    m = study.machine
    page.heading("Method")
    page.text(
        "Each configuration (a cell) ran in processes of its own, one for each rank, through the DeepSpeed engine that",
        f"training uses. The model is a Hugging Face Llama with random weights and a vocabulary of {VOCABULARY}, all seven",
        f"linears of every layer adapted, a lambda-MLP of {LAMBDA_HIDDEN}, gradient checkpointing, AdamW, and the loss on the",
        f"last {ANSWERS} tokens of each sequence. All ranks start a step together and the slowest counts; a cell's time is",
        f"the median of {m['timed_steps']} timed steps, after {m['warmup_steps']} that warm up.",
    )
    page.text(
        f"The base cell: {_settings(study.base)}. Where nothing else is said, a cell differs from it in one setting."
    )
    page.table(["", "measured on"], list(m.items()))


def model(study: Study, page: Page) -> None:
    """Fit, held-out errors, extrapolation."""
    page.heading("A model of the step, and what it says of more ranks")
    fitted = study.prediction
    if isinstance(fitted, str):
        page.text(f"No model was fitted: {fitted}.")
        return
    page.text(
        "Seconds per optimizer step are modelled as a sum over what a step consists of, each amount divided by a rate. The",
        "amounts are the planner's (ldmole_dist/planner); the rates are fitted by non-negative least squares on relative",
        "errors.",
        _held_out(fitted),
        f"Beyond {fitted.cores} ranks, which share {fitted.cores} cores here, every amount counts ranks / cores times."
        if fitted.cores
        else "",
    )
    names = {kind: kind if kind == SEEN else f"held out: {kind}" for kind in fitted.samples}
    rows = [[names[kind], e.cells, f"{e.median:.1%}", f"{e.worst:.1%}"] for kind, e in fitted.errors().items()]
    page.table(["cells", "number", "median error", "worst error"], rows)
    shown = {
        names[kind]: [(s.seconds, fitted.model.predict(s.terms)) for s in samples]
        for kind, samples in fitted.samples.items()
    }
    page.figure(figures.predictions(shown), "predicted against measured seconds")
    rates = [[t, rate(t, s)] for t, s in fitted.model.seconds_per.items()]
    rates += [[t, "not known, counted as nothing: no fitted cell had any"] for t in fitted.unseen()]
    page.table(["term", "fitted rate"], rates)
    _outlook(study, page)


def _held_out(fitted: Prediction) -> str:
    if not fitted.active_held_out:
        return "No cell was held out, as all have the same ranks and experts: how far the model can be trusted is not known."
    active = ", ".join(
        f"{fitted.active.of(E):.1f} for E = {E} (measured there: {mean:.1f})"
        for E, mean in fitted.active_held_out.items()
    )
    return (
        "Held out, by their settings and before the fit, are all cells with the most ranks and all with the most experts: "
        "the model has to extrapolate to them. How many experts a token of theirs activates is predicted too, as "
        f"{fitted.active}, which is fitted to the other cells: {active}."
    )


def _outlook(study: Study, page: Page) -> None:
    fitted = study.prediction
    assert not isinstance(fitted, str)
    own = "a core" if fitted.cores else "a GPU"
    page.text(
        f"The table carries weak scaling of the base cell on to more ranks, as if each had {own} of its own and every pair of",
        "ranks a link as fast as those here, which are this machine's memory or its links between GPUs. It is what these rates",
        "mean on a larger machine of this kind, not a forecast for a network: that takes a study on the nodes in question.",
    )
    columns = ["ranks", "ep_size", f"step with {own} each, s", "tokens/s"]
    if fitted.cores:
        columns.append(f"step on these {fitted.cores} cores, s")
    rows = []
    for cell in fitted.outlook(study.base):
        seconds = fitted.seconds(cell, None)
        row = [str(cell.ranks), str(cell.ep_size), f"{seconds:.2f}", f"{cell.tokens / seconds:,.0f}"]
        rows.append([*row, f"{fitted.seconds(cell, fitted.cores):.2f}"] if fitted.cores else row)
    page.table(columns, rows)


def limits(study: Study, page: Page) -> None:
    """What the page must not be taken for."""
    active = [p.measured.experts_per_token for p in study.points]
    said = [
        "One machine was measured. Nothing here has crossed a network.",
        f"Weights and tokens are random, so routing is that of an untrained adapter: {min(active):.1f} to {max(active):.1f} "
        "experts for a token. A trained one may use others, and more unevenly.",
    ]
    if not isinstance(study.prediction, str) and study.prediction.active_held_out:
        said.append("The model's errors are those of the cells held out; farther away they are not known.")
    if study.cores:
        said += [
            f"Ranks on the CPU compute with one core each. With more ranks than the {study.cores} cores, times measure the "
            "waiting for cores, and what ranks send each other is copied by the same cores.",
            "A node with GPUs is measured by the same command, which uses them where there is one for each rank: "
            "launch/scaling_study.py --full --ranks 1,2,4,8.",
        ]
    page.heading("Limits")
    page.points(said)


def every_cell(study: Study, page: Page) -> None:
    """All rows, and why some failed."""
    page.heading("All cells")
    if failed := [[_settings(row.cell), row.status] for row in study.rows if row.measured is None]:
        page.text("These failed:")
        page.table(["settings", "reason"], failed)
    result_table(page, study.points, AXES)


ALL: tuple[Callable[[Study, Page], None], ...] = (
    summary,
    method,
    results.weak_scaling,
    results.strong_scaling,
    results.experts,
    results.backbone,
    results.dispatch,
    results.stages,
    results.latency,
    model,
    limits,
    every_cell,
)


def _settings(cell: Cell) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in asdict(cell).items())
