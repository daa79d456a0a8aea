"""Predictions against real engines on small models: `ldmole bench plan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from ldmole_dist.ranks import LocalRanks
from ldmole_dist.study.plan.measure import Measured, measure
from ldmole_dist.study.plan.memory import memory
from ldmole_dist.study.plan.traffic import collectives, dispatched
from ldmole_dist.study.plan.workload import Strategy, Workload

# Small models have small weights: at the usual thresholds ZeRO-3 would cut none and gather all at once.
SMALL_ZERO3 = (
    ("stage3_param_persistence_threshold", 500),
    ("stage3_max_reuse_distance", 100_000),
    ("stage3_prefetch_bucket_size", 30_000),
)
PARAMETERS = ("backbone", "experts", "adapter")
OPERATIONS = {"allreduce": "all_reduce", "allgather_base": "all_gather", "reduce_scatter_base": "reduce_scatter"}


class Case(NamedTuple):
    """A configuration, and whether every token is made to use all experts (else it is the measured mean that counts)."""

    workload: Workload
    strategy: Strategy
    dense: bool = False

    @property
    def name(self) -> str:
        """As in "ZeRO 2, ep 4 all_to_all, bf16, 4 ranks"."""
        w, s = self.workload, self.strategy
        parts = [f"ZeRO {s.stage}", f"ep {s.ep_size}" + (f" {s.dispatch}" if s.ep_size > 1 else "")]
        parts += [w.precision, *(["recompute"] if s.checkpointing else []), f"{s.ranks} ranks"]
        return ", ".join(parts + ([f"{w.accumulation} micro-batches"] if w.accumulation > 1 else []))


class Compared(NamedTuple):
    """One number, of the rank where it is most."""

    case: str
    quantity: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted != 0)


def _backbone(kind: type[PretrainedConfig], layers: int) -> PretrainedConfig:
    return kind(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=kind is Qwen3Config,
    )


def cases() -> list[Case]:
    """ZeRO 0 to 3, experts whole and spread, with and without recomputation, both formulations of the experts."""
    llama, qwen = _backbone(LlamaConfig, 4), _backbone(Qwen3Config, 3)
    few = Workload(llama, num_experts=8, rank=4, lambda_hidden=32, micro_batch=2, seq=64, answer_tokens=16)
    many = replace(few, backbone=qwen, num_experts=16, rank=16, dropout=0.0)
    all_few = replace(few, active=8.0)
    return [
        Case(many, Strategy(2, 0, 1, checkpointing=False)),
        Case(replace(few, precision="fp32", accumulation=2), Strategy(2, 0, 2, "gather")),
        Case(replace(many, precision="fp32", accumulation=2), Strategy(2, 1, 2, "gather", checkpointing=False)),
        Case(replace(few, accumulation=2), Strategy(2, 1, 1)),
        Case(all_few, Strategy(4, 2, 4, "all_to_all", checkpointing=False), dense=True),
        Case(replace(all_few, accumulation=2), Strategy(4, 2, 2, "all_to_all"), dense=True),
        Case(few, Strategy(2, 3, 1, checkpointing=False, zero=SMALL_ZERO3)),
        Case(replace(few, accumulation=2, backbone=qwen), Strategy(4, 3, 2, "gather", zero=SMALL_ZERO3)),
    ]


def compare(case: Case, measured: Sequence[Measured]) -> Iterator[Compared]:
    """Predicted and measured: bytes, elements by kind of the dispatch, payload and calls of DeepSpeed's collectives.

    Args:
        case: that was measured.
        measured: of all ranks.
    """
    workload = case.workload if case.dense else replace(case.workload, active=measured[0].active)
    predicted = memory(workload, case.strategy)
    sizes = {"parameters": sum(predicted[part] for part in PARAMETERS)} | predicted
    for part in ("parameters", "gradients", "optimizer", "activations"):
        yield Compared(case.name, f"{part}, bytes", sizes[part], max(m.bytes[part] for m in measured))
    for kind, elements in dispatched(workload, case.strategy).items():
        yield Compared(case.name, f"{kind}, elements", elements, measured[0].wire[kind])
    payload: Counter[tuple[str, int]] = Counter()
    calls: Counter[tuple[str, int]] = Counter()
    for c in collectives(workload, case.strategy):
        payload[c.operation, c.ranks] += c.elements
        calls[c.operation, c.ranks] += c.calls
    for (name, ranks), elements in measured[0].collectives.items():
        if name in OPERATIONS:
            key = OPERATIONS[name], ranks
            yield Compared(case.name, f"{key[0]} over {ranks}, elements", payload.pop(key, 0), elements)
            yield Compared(case.name, f"{key[0]} over {ranks}, calls", calls[key], measured[0].calls[name, ranks])
    for (operation, ranks), elements in payload.items():
        yield Compared(case.name, f"{operation} over {ranks}, elements", elements, 0)


def bench_plan() -> Iterator[Compared]:
    """Measure every case on ranks of this machine."""
    planned = cases()
    for size in sorted({case.strategy.ranks for case in planned}):
        with LocalRanks(size, timeout=600) as ranks:
            for case in planned:
                if case.strategy.ranks == size:
                    yield from compare(case, ranks.run(measure, *case))


def print_table(rows: Iterator[Compared]) -> None:
    """Print as they come; exact ones of a case in one line."""
    case = ""
    exact: list[str] = []
    for row in rows:
        if row.case != case:
            _print_exact(exact)
            case, exact = row.case, []
            print(case)
        if row.quantity.endswith("bytes"):
            print(
                f"  {row.quantity:24} predicted {row.predicted:12,.0f} measured {row.measured:12,.0f} {row.error:+7.2%}"
            )
        elif abs(row.predicted - row.measured) < 1e-6:
            exact.append(row.quantity)
        else:
            print(f"  {row.quantity:40} predicted {row.predicted:12,.1f} measured {row.measured:12,} NOT EQUAL")
    _print_exact(exact)
    print(f"torch {torch.__version__}; of the rank with most")


def _print_exact(quantities: list[str]) -> None:
    if quantities:
        print(f"  exactly equal: {len(quantities)} counts of elements and calls")
