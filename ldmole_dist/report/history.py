"""Route the same tokens with the initial adapter, the checkpoints and the final adapter of a run."""

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
PROBE_TOKENS = 1024  # limits the memory: for 200 linears with 64 experts, the supports take 2 MB per state
MAX_CHECKPOINTS = 12


@dataclass(frozen=True)
class RoutingState:
    """Routing of the probe tokens at one point of a run.

    Attributes:
        label: Number of optimizer steps, or "final".
        sums: Name of a linear -> result of `statistics.routing_sums` for the probe tokens.
        changed: Name of a linear -> fraction of tokens whose support differs from that in the previous state; empty for
            the first state.
        to_final: Name of a linear -> fraction of tokens whose support differs from that with the final adapter.
    """

    label: str
    sums: dict[str, Tensor]
    changed: dict[str, float]
    to_final: dict[str, float]


@dataclass(frozen=True)
class RoutingHistory:
    """Routing of the probe tokens over the course of a run.

    Attributes:
        states: At least two states in the order of training, the last one with the final adapter.
        tokens: Number of probe tokens.
        skipped: Number of checkpoints left out, because at most `MAX_CHECKPOINTS` are routed.
    """

    states: list[RoutingState]
    tokens: int
    skipped: int


class _Snapshot:
    """Observer (`context.Observer`) that records the routing sums and supports of the probe tokens with one adapter."""

    def __init__(self) -> None:
        self.sums, self.supports = RoutingSums(), Supports()

    def __call__(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        self.sums(name, routing, mask_T)
        self.supports(name, routing, mask_T)

    def changed_from(self, other: _Snapshot) -> dict[str, float]:
        """Return, for each linear by its name, the fraction of probe tokens whose support differs from that in `other`."""
        counts = self.supports.changed_from(other.supports)
        return {name: changed / tokens for name, (changed, tokens) in counts.items()}


def trace_history(
    model: PeftModel, saved: SavedModel, examples: Sequence[Encoded], pad_id: int, batch_size: int
) -> RoutingHistory | None:
    """Route the probe tokens with the initial adapter, the checkpoints and the final adapter of a run.

    Args:
        model: Model with the final adapter, in evaluation mode. Other adapters are added and removed; after the call,
            the model has the same state as before.
        saved: Run or adapter of the report.
        examples: Sequences. The probe tokens are those of the first sequences, at most `PROBE_TOKENS` in total.
        pad_id: Token id of the padding.
        batch_size: Sequences per forward.

    Returns:
        The history; None if it has only one state, if the adapter has no run, if the run has no checkpoints, or if the run did
        not train the experts, because its checkpoints then do not contain the experts.

    Raises:
        UserError: If a checkpoint is damaged or does not match the model, or metrics.jsonl is damaged.
    """
    checkpoints = [] if saved.run is None else list_checkpoints(saved.run)[::-1]
    if saved.run is None or not checkpoints or not adapter_config(model).train_experts:
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
        """Add an adapter with `add_adapter(name)`, return a snapshot with it, and remove it."""
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
            # The initial values depend only on the adapter's config, so the initial adapter can be created again without
            # a checkpoint.
            initial = replace(adapter_config(model), inference_mode=False)
            taken.append(("0", snapshot_with(lambda name: model.add_adapter(name, initial))))
        progress.update()
        for checkpoint in chosen:
            with tempfile.TemporaryDirectory() as folder:
                exported = Path(folder) / "adapter"
                export_checkpoint(checkpoint, exported)
                taken.append((str(read_manifest(checkpoint).step), snapshot_with(_loader(model, exported, checkpoint))))
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
    """Read the run's routing.jsonl, reduced to the keys in `RECORDED`.

    Returns:
        One record per line, {"step": ..., "linears": {name: {key: value}}}; empty without a run or a file.

    Raises:
        UserError: If a line is damaged.
    """
    if run is None:
        return []
    path, records = run / "routing.jsonl", []
    for number, record in enumerate(read_jsonl(path), start=1):
        try:
            linears = {
                # lambda_mean is optional, because some routers have no lambda; the other keys are required.
                name: {key: summary[key] for key in RECORDED if key in summary or key != "lambda_mean"}
                for name, summary in record["linears"].items()
            }
            records.append({"step": int(record["step"]), "linears": linears})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is damaged ({type(error).__name__}: {error}); delete the line or the file."
            ) from error
    return records


def last_step(run: Path) -> int | None:
    """Return the last step in the run's metrics.jsonl; None if the file is missing or empty.

    Raises:
        UserError: If a line is not valid JSON.
    """
    metrics = read_jsonl(run / "metrics.jsonl")
    return metrics[-1]["step"] if metrics else None


def _loader(model: PeftModel, folder: Path, checkpoint: Path) -> Callable[[str], None]:
    """Return a function that adds the adapter in `folder`, exported from `checkpoint`, to the model under a given name."""

    def load(name: str) -> None:
        try:
            model.load_adapter(str(folder), name, is_trainable=False)
        except ValueError as error:
            raise UserError(f"cannot load the adapter of the checkpoint {checkpoint}: {error}") from error

    return load


def _probe(examples: Sequence[Encoded]) -> list[Encoded]:
    """Return the first sequences that together have at most `PROBE_TOKENS` tokens; a longer first one is truncated."""
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
    """Return `most` evenly spaced checkpoints, including the first and the last; all of them if there are fewer."""
    count = min(len(checkpoints), most)
    return [checkpoints[round(i)] for i in np.linspace(0, len(checkpoints) - 1, count)]
