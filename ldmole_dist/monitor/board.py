"""Routing statistics in TensorBoard, grouped so that models with many layers stay readable.

- Scalars `routing/<statistic>/<projection>`: the mean over layers.
- Scalars `layers/<projection>/<statistic>/<layer>`: each linear.
- Histograms `experts_per_token/<projection>`: how many experts are active per token.
- Images `load/<projection>`: the load of each expert (column) in each layer (row).

The layout of the custom scalars page combines related scalars into one chart.
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

HEADLINES: dict[str, list[str]] = {
    "loss": ["train/loss$", "train/loss_task$"],
    "auxiliary losses": [],  # filled in by write_layout: they depend on the router
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
    """Write the layout of TensorBoard's custom scalars page: which scalars share a chart.

    Args:
        board: TensorBoard writer of the run.
        metrics: names of the metrics of a step; the router decides which auxiliary losses and whether lambda are among them.
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
    """Write scalars, given by tag, as one TensorBoard event.

    `SummaryWriter.add_scalar` writes an event per scalar: thousands of them fill the writer's queue, which then blocks rank 0
    and with it all ranks.
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
    """Write each linear's share (0 to 1) of probe tokens whose active experts changed since the last evaluation."""
    write_scalars(board, step, _tagged(Linears(changed), CHANGED, changed))


def _reported(routing: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the `STATISTICS` that the router has; only some routers have a lambda."""
    return [name for name in STATISTICS if name in next(iter(routing.values()))]


def _tagged(linears: Linears, statistic: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return values by TensorBoard tag: the mean of each projection, and each linear that is in a numbered layer."""
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
        projection: of the linears.
        share_of_count: (E + 1,) share of tokens with 0, 1, ..., E active experts; each becomes one bucket.
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
    """Return the load of N linears' experts as an RGB image, (height, width, 3) from 0 to 1.

    White is no load, dark blue twice the balanced share or more, red an expert without tokens, and grey a cell of a linear with
    fewer than E experts.
    """
    load = as_table(load_NE, np.nan)
    exists = np.isfinite(load)
    darkness = np.clip(np.nan_to_num(load) * exists.sum(axis=1, keepdims=True) / 2, 0, 1)
    colors = np.stack([1 - 0.95 * darkness, 1 - 0.75 * darkness, 1 - 0.4 * darkness], axis=-1)
    colors[load == 0] = (0.8, 0.1, 0.1)
    colors[~exists] = (0.6, 0.6, 0.6)
    return colors.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
