"""How routing moved in the course of a run: the same few tokens are routed by each of its checkpoints and by its adapter.

Shapes: T tokens of the probe, E experts, N bytes that E bits take.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from ldmole_dist.checkpoint.export import export_checkpoint
from ldmole_dist.checkpoint.load import newest
from ldmole_dist.checkpoint.manifest import read_manifest
from ldmole_dist.data.encode import Encoded
from ldmole_dist.errors import UserError
from ldmole_dist.io import read_lines
from ldmole_dist.method.routers import Routing
from ldmole_dist.method.statistics import RoutingSums
from ldmole_dist.model.forward import route
from ldmole_dist.model.saved import SavedModel
from ldmole_dist.monitor.supports import Supports
from ldmole_dist.report.collect import batches
from ldmole_dist.report.inputs import adapter_config

CURVES = ("lambda_mean", "experts_per_token", "max_load", "dead_experts")  # of a linear, over the steps of a run
PROBE_TOKENS = 1024  # 200 linears of 64 experts: 2 MB of supports for each state
MOST_CHECKPOINTS = 12


@dataclass(frozen=True)
class State:
    """The routing of the probe at one point of the run.

    Attributes:
        label: for an axis: the number of optimizer steps done, or "final".
        sums: linear -> `routing_sums` over the probe.
        changed: linear -> share of the probe's tokens whose set of active experts differs from the state before; empty for
            the first.
        to_final: the same, from the final adapter.
    """

    label: str
    sums: dict[str, Tensor]
    changed: dict[str, float]
    to_final: dict[str, float]


@dataclass(frozen=True)
class Movement:
    """The states of a run in order, the final adapter last.

    Attributes:
        states: at least two.
        tokens: of the probe.
        left_out: checkpoints that were passed over, as there are too many.
    """

    states: list[State]
    tokens: int
    left_out: int


class _Seen:
    """An observer of one state: sums and supports."""

    def __init__(self) -> None:
        self.sums, self.supports = RoutingSums(), Supports()

    def __call__(self, name: str, routing: Routing, mask_T: Tensor | None) -> None:
        """See `context.Observer`."""
        self.sums(name, routing, mask_T)
        self.supports(name, routing, mask_T)

    def changed_from(self, other: _Seen) -> dict[str, float]:
        """Linear -> share of tokens whose set of active experts is not the same."""
        counts = self.supports.changed_from(other.supports)
        return {name: changed / tokens for name, (changed, tokens) in counts.items()}


def trace_movement(
    model: PeftModel, saved: SavedModel, examples: Sequence[Encoded], pad_id: int, batch_size: int
) -> Movement | None:
    """Route the same tokens by the initial values of the adapter, by checkpoints of the run, and by its final adapter.

    Args:
        model: with the final adapter, in evaluation mode; it is as it was afterwards.
        saved: of the report.
        examples: of which the first, up to `PROBE_TOKENS` tokens, are the probe.
        pad_id: for batches.
        batch_size: sequences of one forward.

    Returns:
        None where there is no run or it kept no checkpoint.

    Raises:
        UserError: where a checkpoint is damaged, or of another adapter.
    """
    checkpoints = [] if saved.run is None else newest(saved.run)[::-1]
    if saved.run is None or not checkpoints:
        return None
    chosen = _spread(checkpoints, MOST_CHECKPOINTS)
    probe = _probe(examples)
    device = next(model.parameters()).device

    def supports() -> _Seen:
        observer = _Seen()
        for batch in batches(probe, pad_id, batch_size, device):
            route(model, batch, observer)
        return observer

    def other(attach: Callable[[str], Any]) -> _Seen:
        """The supports of another adapter, which `attach` adds to the model under the name given."""
        (own,) = model.active_adapters
        attach("other")
        try:
            model.set_adapter("other")
            model.eval()
            return supports()
        finally:
            model.set_adapter(own, inference_mode=True)
            model.delete_adapter("other")

    final = supports()
    states: list[State] = []
    before: _Seen | None = None

    def add(label: str, now: _Seen) -> None:
        nonlocal before
        changed = {} if before is None else now.changed_from(before)
        states.append(State(label, now.sums.by_linear, changed, now.changed_from(final)))
        before = now

    with tqdm(total=len(chosen) + 1, desc="routing by checkpoints", unit="checkpoint") as progress:
        if saved.config is not None and saved.config.adapter.init_from is None:
            # Initial values depend on the seed alone: what the run began with need not have been saved.
            add("0", other(lambda name: model.add_adapter(name, replace(adapter_config(model), inference_mode=False))))
        progress.update()
        for checkpoint in chosen:
            with tempfile.TemporaryDirectory() as folder:
                exported = Path(folder) / "adapter"
                export_checkpoint(checkpoint, exported)
                now = other(lambda name, path=str(exported): _load(model, path, name))  # type: ignore[misc]
            add(str(read_manifest(checkpoint).step), now)
            progress.update()
    if states[-1].label != str(last_step(saved.run)):
        add("final", final)
    if len(states) == 1:
        return None
    return Movement(states, sum(len(example.input_ids) for example in probe), len(checkpoints) - len(chosen))


def read_curves(run: Path | None) -> list[dict[str, Any]]:
    """The lines of the run's routing.jsonl, `{"step": ..., "linears": {name: numbers}}`, of the numbers those that are drawn;
    empty where there is none.

    Raises:
        UserError: naming the line that is not as above.
    """
    if run is None:
        return []
    path, lines = run / "routing.jsonl", []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            read = json.loads(line)
            linears = {
                # lambda is missing where the router has none
                name: {key: summary[key] for key in CURVES if key in summary or key != "lambda_mean"}
                for name, summary in read["linears"].items()
            }
            lines.append({"step": int(read["step"]), "linears": linears})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is damaged: remove the line, or the file") from error
    return lines


def last_step(run: Path) -> int | None:
    """Optimizer steps that the run did, where its metrics.jsonl says."""
    last = None
    for line in read_lines(run / "metrics.jsonl"):
        last = line
    return None if last is None else json.loads(last)["step"]


def _load(model: PeftModel, folder: str, name: str) -> None:
    try:
        model.load_adapter(folder, name, is_trainable=False)
    except ValueError as error:
        raise UserError(str(error)) from error


def _probe(examples: Sequence[Encoded]) -> list[Encoded]:
    """The first of them that have at most `PROBE_TOKENS` tokens together, at least one, itself cut to that."""
    probe: list[Encoded] = []
    left = PROBE_TOKENS
    for example in examples:
        if probe and len(example.input_ids) > left:
            break
        labels = example.labels if isinstance(example.labels, int) else example.labels[:PROBE_TOKENS]
        probe.append(Encoded(example.input_ids[:PROBE_TOKENS], labels))
        left -= len(probe[-1].input_ids)
    return probe


def _spread(checkpoints: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(checkpoints) <= most:
        return list(checkpoints)
    return [checkpoints[round(i * (len(checkpoints) - 1) / (most - 1))] for i in range(most)]
