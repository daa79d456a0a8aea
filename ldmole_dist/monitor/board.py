"""Routing in TensorBoard, so that a model of many layers stays readable.

"routing/<number>/<projection>" is the mean over layers, a few lines to look at; "layers/<projection>/<number>/<layer>" has each
linear; a histogram for each projection shows how many experts tokens have, an image how experts (columns) of each layer (rows)
are loaded. The custom scalars page puts the lines of one kind into one chart.
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

NUMBERS = ("lambda_mean", "lambda_std", "experts_per_token", "entropy", "max_load", "dead_experts")
CHANGED = "support_changed"
PIXELS = 16  # side of one (layer, expert) in an image

HEADLINES: dict[str, list[str]] = {
    "loss": ["train/loss$", "train/loss_task$"],
    "auxiliary losses": [],  # depend on the router
    "evaluation loss": ["eval/eval_loss$"],
    "evaluation accuracy": ["eval/accuracy$"],
    "experts per token": ["train/experts_per_token$"],
    "lambda, mean and spread": ["train/lambda_mean$", "train/lambda_std$"],
    "dead experts": ["train/dead_experts$"],
    "tokens of the probe set whose experts changed": [f"eval/{CHANGED}$"],
    "gradient norm, by part": ["train/grad_norm$", "grad_norm_by_part/"],
    "tokens per second": ["train/tokens_per_second$"],
    "seconds of a step in dispatch": ["dispatch_seconds/"],
    "elements on the wire": ["train/wire_elements$"],
    "peak memory, GB": ["train/peak_memory_gb$"],
}


def write_layout(board: SummaryWriter, metrics: Iterable[str], routing: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell TensorBoard's custom scalars page which lines belong into one chart.

    Args:
        board: of the run.
        metrics: the names of what a step reports: auxiliary losses and lambda depend on the router.
        routing: name of a linear -> `statistics.summarize`.
    """
    headlines, table, metrics = dict(HEADLINES), Linears(routing), set(metrics)
    headlines["auxiliary losses"] = [f"train/loss_{term}$" for term in TERMS if f"loss_{term}" in metrics]
    if "lambda_mean" not in metrics:
        del headlines["lambda, mean and spread"]
    layered = [p for p in table.projections if any(table.place[name].layer is not None for name in table.of(p))]
    numbers = [*_reported(routing), CHANGED]
    layout = {
        "1 headlines": {title: ["Multiline", tags] for title, tags in headlines.items() if tags},
        "2 routing by projection": {number: ["Multiline", [f"routing/{number}/"]] for number in numbers},
        "3 routing by layer": {
            f"{projection}: {number}": ["Multiline", [f"layers/{re.escape(projection)}/{number}/"]]
            for projection in layered
            for number in numbers
        },
    }
    board.add_custom_scalars(layout)


def write_scalars(board: SummaryWriter, step: int, values: Mapping[str, float]) -> None:
    """Numbers by tag, as one event: one for each would make the writer's queue wait, and with it all ranks."""
    assert board.file_writer is not None, "the board is closed"
    scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    board.file_writer.add_summary(Summary(value=scalars), step)


def write_routing(board: SummaryWriter, step: int, routing: dict[str, dict[str, Any]]) -> None:
    """Everything that one detailed report says of the linears.

    Args:
        board: of the run.
        step: optimizer step, from 1.
        routing: name of a linear -> `statistics.summarize`.
    """
    linears = Linears(routing)
    scalars: dict[str, float] = {}
    for number in _reported(routing):
        scalars |= _by_place(linears, number, {name: summary[number] for name, summary in routing.items()})
    write_scalars(board, step, scalars)
    for projection in linears.projections:
        summaries = [routing[name] for name in linears.of(projection)]
        _write_histogram(board, step, projection, np.mean(as_table([s["histogram"] for s in summaries], 0), axis=0))
        board.add_image(f"load/{projection}", _heat_map([s["load"] for s in summaries]), step, dataformats="HWC")


def write_changes(board: SummaryWriter, step: int, changed: dict[str, float]) -> None:
    """The share of the probe set's tokens whose experts changed, for each linear."""
    write_scalars(board, step, _by_place(Linears(changed), CHANGED, changed))


def _reported(routing: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those of `NUMBERS` that there are: not every router has a lambda."""
    return [number for number in NUMBERS if number in next(iter(routing.values()))]


def _by_place(linears: Linears, number: str, values: Mapping[str, float]) -> dict[str, float]:
    """Tag -> value: the mean of each projection, and each linear of a numbered layer."""
    tags: dict[str, float] = {}
    for projection in linears.projections:
        names = linears.of(projection)
        tags[f"routing/{number}/{projection}"] = float(np.mean([values[name] for name in names]))
        for name in names:
            layer = linears.place[name].layer
            if layer is not None:
                tags[f"layers/{projection}/{number}/{layer:03}"] = values[name]
    return tags


def _write_histogram(board: SummaryWriter, step: int, projection: str, share_of_count: np.ndarray) -> None:
    """How many tokens have 0, 1, ..., E experts, one bucket for each."""
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
    """(height, width, 3) from 0 to 1: from white to dark blue at twice the even share of the load; red without a token, grey
    where the linear has fewer experts than others."""
    load = as_table(load_NE, np.nan)
    there = np.isfinite(load)
    darkness = np.clip(np.nan_to_num(load) * there.sum(axis=1, keepdims=True) / 2, 0, 1)
    colours = np.stack([1 - 0.95 * darkness, 1 - 0.75 * darkness, 1 - 0.4 * darkness], axis=-1)
    colours[load == 0] = (0.8, 0.1, 0.1)
    colours[~there] = (0.6, 0.6, 0.6)
    return colours.repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
