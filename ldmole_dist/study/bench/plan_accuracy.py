"""Predictions against real engines on small models: `ldmole bench plan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from ldmole_dist.parallel.decision import choose_fetched_experts, payload_elements
from ldmole_dist.planner.expert_costs import group_sizes
from ldmole_dist.planner.memory import memory
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.traffic import (
    collective_calls,
    collectives,
    dispatch_elements,
    element_bytes,
    micro_batch_elements,
)
from ldmole_dist.planner.workload import Strategy, Workload
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.study.bench.plan_measure import Measured, measure

# Small models have small weights: at the usual thresholds ZeRO-3 would cut none and gather all at once.
SMALL_ZERO3 = (
    ("stage3_param_persistence_threshold", 500),
    ("stage3_max_reuse_distance", 100_000),
    ("stage3_prefetch_bucket_size", 30_000),
)
PARAMETERS = ("backbone", "experts", "adapter")
OPERATIONS = {"allreduce": "all_reduce", "allgather_base": "all_gather", "reduce_scatter_base": "reduce_scatter"}
ALL_TO_ALL = "alltoall_base"  # whose elements are counted by `parallel.wire`


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

    @property
    def drawn(self) -> bool:
        """Whether what the dispatch moves hangs on which token has which expert, and the planner only has an expectation."""
        return self.strategy.ep_size > 1 and self.strategy.dispatch != "gather" and not self.dense


class Compared(NamedTuple):
    """One number, of the rank where it is most; elements that hang on drawn routing, of all ranks."""

    case: str
    quantity: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted != 0)


def _backbone(kind: Callable[..., PretrainedConfig], layers: int) -> PretrainedConfig:
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
    few = Workload(
        llama, num_experts=8, lora_rank=4, lambda_hidden=32, micro_batch=2, seq=64, answer_tokens=16, on_cpu=True
    )
    many = replace(few, backbone=qwen, num_experts=16, lora_rank=16, dropout=0.0)
    all_few = replace(few, active=8.0)
    return [
        Case(many, Strategy(2, 0, 1, checkpointing=False)),
        Case(replace(few, precision="fp32", accumulation=2), Strategy(2, 0, 2, "gather")),
        Case(replace(many, precision="fp32", accumulation=2), Strategy(2, 1, 2, "gather", checkpointing=False)),
        Case(replace(few, accumulation=2), Strategy(2, 1, 1)),
        Case(all_few, Strategy(4, 2, 4, "all_to_all", checkpointing=False), dense=True),
        Case(replace(all_few, accumulation=2), Strategy(4, 2, 2, "all_to_all"), dense=True),
        Case(replace(many, accumulation=2), Strategy(2, 1, 2, "auto")),
        Case(few, Strategy(2, 3, 1, checkpointing=False, zero=SMALL_ZERO3)),
        Case(replace(few, accumulation=2, backbone=qwen), Strategy(4, 3, 2, "gather", zero=SMALL_ZERO3)),
    ]


def compare(case: Case, measured: Sequence[Measured]) -> Iterator[Compared]:
    """Predicted and measured: bytes, elements by kind of the dispatch, payload and calls of every collective.

    What was measured and not predicted, or predicted and not measured, is compared with 0.

    Args:
        case: that was measured.
        measured: of all ranks.
    """
    workload = case.workload if case.dense else replace(case.workload, active=measured[0].active)
    predicted = memory(workload, case.strategy)
    sizes = {"parameters": sum(predicted[part] for part in PARAMETERS)} | predicted
    for part in ("parameters", "gradients", "optimizer", "activations"):
        yield Compared(case.name, f"{part}, bytes", sizes[part], max(m.bytes[part] for m in measured))
    yield from _compare_dispatch(case, workload, measured)
    payload: Counter[tuple[str, int]] = Counter()
    calls: Counter[tuple[str, int]] = Counter()
    for c in collectives(workload, case.strategy):
        payload[c.operation, c.ranks] += c.elements
        calls[c.operation, c.ranks] += c.calls
    calls["all_to_all", case.strategy.ep_size] += int(collective_calls(workload, case.strategy).get("dispatch", 0))
    names = {**OPERATIONS, ALL_TO_ALL: "all_to_all"}
    carried = {
        (names.get(name, name), n): of for (name, n), of in measured[0].collectives.items() if name != ALL_TO_ALL
    }
    called = {(names.get(name, name), n): of for (name, n), of in measured[0].calls.items()}
    for what, mine, theirs in (("elements", payload, carried), ("calls", calls, called)):
        for operation, ranks in sorted(mine.keys() | theirs.keys()):
            key = operation, ranks
            yield Compared(case.name, f"{operation} over {ranks}, {what}", mine[key], theirs.get(key, 0))


def _compare_dispatch(case: Case, workload: Workload, measured: Sequence[Measured]) -> Iterator[Compared]:
    """Elements and bytes by the kinds of `parallel.wire`: of the first rank, or of all where routing is drawn."""
    of = measured if case.drawn else measured[:1]
    sent: Mapping[str, float] = (
        _from_supports(case, measured) if case.drawn else dispatch_elements(workload, case.strategy)
    )
    for kind in sorted(sent.keys() | {kind for m in of for kind in m.wire}):
        number = sent.get(kind, 0)
        yield Compared(case.name, f"{kind}, elements", number, sum(m.wire[kind] for m in of))
        in_bytes = number * element_bytes(kind, workload)
        yield Compared(case.name, f"{kind}, bytes sent", in_bytes, sum(m.wire_bytes[kind] for m in of))


def _from_supports(case: Case, measured: Sequence[Measured]) -> Counter[str]:
    """What all ranks send where each token has the experts that it had, by the rule of `dispatch: auto`."""
    workload, strategy = case.workload, case.strategy
    groups = shapes_of(workload).groups
    sent: Counter[str] = Counter()
    for rank, m in enumerate(measured):
        own, supports = rank % strategy.ep_size, iter(m.supports)
        for _ in range(workload.accumulation):
            forwards = []
            for group in groups:
                support_GTE = torch.stack([torch.from_numpy(next(supports)) for _ in group.out_features])
                support_GTPL = support_GTE.unflatten(2, (strategy.ep_size, -1))
                sizes = group_sizes(group, workload, strategy)
                forwards.append(
                    payload_elements(support_GTPL, choose_fetched_experts(support_GTPL, own, sizes), own, sizes)
                )
            sent.update(micro_batch_elements(forwards, workload, strategy))  # type: ignore[arg-type]
    return sent


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
