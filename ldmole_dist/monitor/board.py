"""Routing statistics in TensorBoard, grouped so that charts of models with many layers remain readable.

- Scalars `routing/<statistic>/<projection>`: mean over the layers.
- Scalars `layers/<projection>/<statistic>/<layer>`: value of one linear.
- Histograms `experts_per_token/<projection>`: share of tokens by number of active experts, mean over the layers.
- Images `load/<projection>`: load of each expert (column) in each layer (row). The load is the expert's share of the active
  (token, expert) pairs of its linear.

The layout of the custom scalars page combines related scalars in one chart.

Shapes: N linears, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from ldmole_dist.method.context import TERMS
from ldmole_dist.monitor.linears import Linears, as_table

STATISTICS = ("lambda_mean", "lambda_std", "experts_per_token", "entropy", "max_load", "dead_experts")
CHANGED = "support_changed"
PIXELS = 16  # width and height of one (layer, expert) cell in an image

# Chart title -> regular expressions of the tags in the chart.
HEADLINES: dict[str, list[str]] = {
    "loss": ["train/loss$", "train/loss_task$"],
    "auxiliary losses": [],  # write_layout adds those of the router
    "evaluation loss": ["eval/eval_loss$"],
    "evaluation accuracy": ["eval/accuracy$"],
    "experts per token": ["train/experts_per_token$"],
    "lambda, mean and spread": ["train/lambda_mean$", "train/lambda_std$"],
    "dead experts": ["train/dead_experts$"],
    "share of probe tokens whose experts changed": [f"eval/{CHANGED}$"],
    "gradient norm, by part": ["train/grad_norm$", "grad_norm_by_part/"],
    "tokens per second": ["train/tokens_per_second$"],
    "seconds per step in dispatch": ["dispatch_seconds/"],
    "elements sent": ["train/wire_elements$"],
    "peak memory, GB": ["train/peak_memory_gb$"],
}


def write_layout(board: SummaryWriter, metrics: Iterable[str], routing: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the layout of TensorBoard's custom scalars page, which determines the scalars of each chart.

    Args:
        board: TensorBoard writer of the run.
        metrics: names of the metrics of a step; auxiliary losses and lambda are among them only if the router has them.
        routing: name of a linear -> statistics from `statistics.summarize`.
    """
    headlines, table, metrics = dict(HEADLINES), Linears(routing), set(metrics)
    headlines["auxiliary losses"] = [f"train/loss_{term}$" for term in TERMS if f"loss_{term}" in metrics]
    if "lambda_mean" not in metrics:
        del headlines["lambda, mean and spread"]
    layered = [p for p in table.projections if any(table.position[name].layer is not None for name in table.of(p))]
    statistics = [*_reported(routing), CHANGED]
    layout = {
        "1 headlines": {title: ["Multiline", tags] for title, tags in headlines.items() if tags},
        "2 routing by projection": {name: ["Multiline", [f"routing/{name}/"]] for name in statistics},
        "3 routing by layer": {
            f"{projection}: {name}": ["Multiline", [f"layers/{re.escape(projection)}/{name}/"]]
            for projection in layered
            for name in statistics
        },
    }
    board.add_custom_scalars(layout)


def write_scalars(board: SummaryWriter, step: int, values: Mapping[str, float]) -> None:
    """Write several scalars as one TensorBoard event.

    `SummaryWriter.add_scalar` writes one event per scalar. Thousands of events fill the writer's queue, which then blocks rank
    0, and the other ranks wait for rank 0.

    Args:
        board: TensorBoard writer of the run.
        step: number of optimizer steps done.
        values: tag -> value.
    """
    assert board.file_writer is not None, "the TensorBoard writer is closed"
    scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    board.file_writer.add_summary(Summary(value=scalars), step)


def write_routing(board: SummaryWriter, step: int, routing: dict[str, dict[str, Any]]) -> None:
    """Write the routing statistics of one detailed report.

    Args:
        board: TensorBoard writer of the run.
        step: optimizer step, from 1.
        routing: name of a linear -> statistics from `statistics.summarize`.
    """
    linears = Linears(routing)
    scalars: dict[str, float] = {}
    for statistic in _reported(routing):
        values = {name: summary[statistic] for name, summary in routing.items()}
        scalars |= _tagged(linears, statistic, values)
    write_scalars(board, step, scalars)
    for projection in linears.projections:
        summaries = [routing[name] for name in linears.of(projection)]
        _write_histogram(board, step, projection, np.mean(as_table([s["histogram"] for s in summaries], 0), axis=0))
        board.add_image(f"load/{projection}", _heat_map([s["load"] for s in summaries]), step, dataformats="HWC")


def write_changes(board: SummaryWriter, step: int, changed: dict[str, float]) -> None:
    """Write how routing changed since the previous evaluation.

    Args:
        board: TensorBoard writer of the run.
        step: number of optimizer steps done.
        changed: name of a linear -> share (0 to 1) of probe tokens whose set of active experts changed.
    """
    write_scalars(board, step, _tagged(Linears(changed), CHANGED, changed))


def _reported(routing: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names in `STATISTICS` that are in `routing`; only some routers have a lambda."""
    return [name for name in STATISTICS if name in next(iter(routing.values()))]


def _tagged(linears: Linears, statistic: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return TensorBoard tag -> value: the mean of each projection, and the value of each linear in a numbered layer."""
    tags: dict[str, float] = {}
    for projection in linears.projections:
        names = linears.of(projection)
        tags[f"routing/{statistic}/{projection}"] = float(np.mean([values[name] for name in names]))
        for name in names:
            layer = linears.position[name].layer
            if layer is not None:
                tags[f"layers/{projection}/{statistic}/{layer:03}"] = values[name]
    return tags


def _write_histogram(board: SummaryWriter, step: int, projection: str, share_of_count: np.ndarray) -> None:
    """Write a histogram of active experts per token.

    Args:
        board: TensorBoard writer of the run.
        step: optimizer step, from 1.
        projection: projection of the linears, such as "q_proj".
        share_of_count: (E + 1,) share of the tokens with 0, 1, ..., E active experts; each count is one bucket.
    """
    counts = np.arange(len(share_of_count))
    board.add_histogram_raw(
        f"experts_per_token/{projection}",
        min=-0.5,
        max=counts[-1] + 0.5,
        num=1,
        sum=float(share_of_count @ counts),
        sum_squares=float(share_of_count @ counts**2),
        bucket_limits=(counts + 0.5).tolist(),
        bucket_counts=share_of_count.tolist(),
        global_step=step,
    )


def _heat_map(load_NE: list[list[float]]) -> np.ndarray:
    """Return the load of the experts of N linears as an RGB image, (N * PIXELS, E * PIXELS, 3) from 0 to 1.

    E is the largest number of experts. The color of a cell ranges from white for a load near 0 to dark blue for twice the
    balanced load or more. Red marks an expert without tokens, grey an expert that the linear does not have.
    """
    load = as_table(load_NE, np.nan)
    exists = np.isfinite(load)
    darkness = np.clip(np.nan_to_num(load) * exists.sum(axis=1, keepdims=True) / 2, 0, 1)
    colors = np.stack([1 - 0.95 * darkness, 1 - 0.75 * darkness, 1 - 0.4 * darkness], axis=-1)
    colors[load == 0] = (0.8, 0.1, 0.1)
    colors[~exists] = (0.6, 0.6, 0.6)
    return colors.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
