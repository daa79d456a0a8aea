"""Routing over the course of a run: its initial adapter, checkpoints and final adapter route the same tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from ldmole_dist.checkpoint.export import export_checkpoint
from ldmole_dist.checkpoint.load import list_checkpoints
from ldmole_dist.checkpoint.manifest import read_manifest
from ldmole_dist.data.encode import Encoded
from ldmole_dist.errors import UserError
from ldmole_dist.io import read_jsonl
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.statistics import RoutingSums
from ldmole_dist.model.forward import observe_routing
from ldmole_dist.model.saved import SavedModel
from ldmole_dist.monitor.supports import Supports
from ldmole_dist.report.collect import batches
from ldmole_dist.report.inputs import adapter_config

RECORDED = ("lambda_mean", "experts_per_token", "max_load", "dead_experts")  # keys of a linear in routing.jsonl
PROBE_TOKENS = 1024  # supports of 200 linears with 64 experts take 2 MB per state
MAX_CHECKPOINTS = 12


@dataclass(frozen=True)
class RoutingState:
    """Routing of the probe tokens at one point of a run.

    Attributes:
        label: Number of optimizer steps, or "final".
        sums: Name of a linear -> `routing_sums` over the probe.
        changed: Name of a linear -> share of tokens whose support differs from the previous state; empty for the first.
        to_final: Name of a linear -> share of tokens whose support differs from the final adapter's.
    """

    label: str
    sums: dict[str, Tensor]
    changed: dict[str, float]
    to_final: dict[str, float]


@dataclass(frozen=True)
class RoutingHistory:
    """States of a run in order, the final adapter last.

    Attributes:
        states: At least two states.
        tokens: Number of probe tokens.
        skipped: Number of checkpoints left out to stay within `MAX_CHECKPOINTS`.
    """

    states: list[RoutingState]
    tokens: int
    skipped: int


class _Snapshot:
    """Observer that records the routing sums and supports of one state."""

    def __init__(self) -> None:
        self.sums, self.supports = RoutingSums(), Supports()

    def __call__(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        self.sums(name, routing, mask_T)
        self.supports(name, routing, mask_T)

    def changed_from(self, other: _Snapshot) -> dict[str, float]:
        """Return the share of tokens whose support differs, by linear."""
        counts = self.supports.changed_from(other.supports)
        return {name: changed / tokens for name, (changed, tokens) in counts.items()}


def trace_history(
    model: PeftModel, saved: SavedModel, examples: Sequence[Encoded], pad_id: int, batch_size: int
) -> RoutingHistory | None:
    """Route the same tokens with the initial adapter, the checkpoints and the final adapter of a run.

    Args:
        model: Model with the final adapter, in evaluation mode; restored before the function returns.
        saved: Run or adapter of the report.
        examples: Sequences; the first `PROBE_TOKENS` tokens are routed.
        pad_id: Token id of the padding.
        batch_size: Sequences per forward.

    Returns:
        None without a run, or for a run that kept no checkpoint.

    Raises:
        UserError: If a checkpoint is damaged or does not fit the model.
    """
    checkpoints = [] if saved.run is None else list_checkpoints(saved.run)[::-1]
    if saved.run is None or not checkpoints:
        return None
    chosen = _evenly_spaced(checkpoints, MAX_CHECKPOINTS)
    probe = _probe(examples)
    device = next(model.parameters()).device

    def snapshot() -> _Snapshot:
        observer = _Snapshot()
        for batch in batches(probe, pad_id, batch_size, device):
            observe_routing(model, batch, observer)
        return observer

    def snapshot_with(add_adapter: Callable[[str], Any]) -> _Snapshot:
        """Add another adapter under the given name, take a snapshot with it, and remove it."""
        (own,) = model.active_adapters
        add_adapter("other")
        try:
            model.set_adapter("other")
            model.eval()
            return snapshot()
        finally:
            model.set_adapter(own, inference_mode=True)
            model.delete_adapter("other")

    final = snapshot()
    taken: list[tuple[str, _Snapshot]] = []
    with tqdm(total=len(chosen) + 1, desc="routing by checkpoint", unit="checkpoint") as progress:
        if saved.config is not None and saved.config.adapter.init_from is None:
            # The initial values depend on the seed alone, so they need no checkpoint.
            initial = replace(adapter_config(model), inference_mode=False)
            taken.append(("0", snapshot_with(lambda name: model.add_adapter(name, initial))))
        progress.update()
        for checkpoint in chosen:
            with tempfile.TemporaryDirectory() as folder:
                exported = Path(folder) / "adapter"
                export_checkpoint(checkpoint, exported)
                taken.append((str(read_manifest(checkpoint).step), snapshot_with(_loader(model, str(exported)))))
            progress.update()
    if taken[-1][0] != str(last_step(saved.run)):
        taken.append(("final", final))
    if len(taken) == 1:
        return None
    states = [
        RoutingState(label, now.sums.by_linear, now.changed_from(taken[i - 1][1]) if i else {}, now.changed_from(final))
        for i, (label, now) in enumerate(taken)
    ]
    return RoutingHistory(states, sum(len(example.input_ids) for example in probe), len(checkpoints) - len(chosen))


def read_routing_log(run: Path | None) -> list[dict[str, Any]]:
    """Return the lines of the run's routing.jsonl, reduced to the keys in `RECORDED`; empty where there is no file.

    Raises:
        UserError: If a line is damaged.
    """
    if run is None:
        return []
    path, records = run / "routing.jsonl", []
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            linears = {
                # Routers without a lambda do not record one; the other keys are required.
                name: {key: summary[key] for key in RECORDED if key in summary or key != "lambda_mean"}
                for name, summary in record["linears"].items()
            }
            records.append({"step": int(record["step"]), "linears": linears})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is damaged; remove the line or the file.") from error
    return records


def last_step(run: Path) -> int | None:
    """Return the step of the last line of metrics.jsonl, or None without one."""
    metrics = read_jsonl(run / "metrics.jsonl")
    return metrics[-1]["step"] if metrics else None


def _loader(model: PeftModel, folder: str) -> Callable[[str], None]:
    def load(name: str) -> None:
        try:
            model.load_adapter(folder, name, is_trainable=False)
        except ValueError as error:
            raise UserError(str(error)) from error

    return load


def _probe(examples: Sequence[Encoded]) -> list[Encoded]:
    """Return the first sequences with at most `PROBE_TOKENS` tokens in total; the first one is truncated to fit."""
    probe: list[Encoded] = []
    left = PROBE_TOKENS
    for example in examples:
        if probe and len(example.input_ids) > left:
            break
        labels = example.labels if isinstance(example.labels, int) else example.labels[:PROBE_TOKENS]
        probe.append(Encoded(example.input_ids[:PROBE_TOKENS], labels))
        left -= len(probe[-1].input_ids)
    return probe


def _evenly_spaced(checkpoints: Sequence[Path], most: int) -> list[Path]:
    """Return at most `most` checkpoints, evenly spaced, including the first and the last."""
    count = min(len(checkpoints), most)
    return [checkpoints[round(i)] for i in np.linspace(0, len(checkpoints) - 1, count)]
