"""Compare the planner's predictions with real engines on small models: `ldmole bench plan`.

A quantity that is measured but not predicted, or predicted but not measured, is compared with 0.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import LlamaConfig, Qwen3Config

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
from ldmole_dist.study.machine import setup
from ldmole_dist.study.table import markdown_table

# The default thresholds would leave the weights of such small models unpartitioned, and gather them all at once.
SMALL_ZERO3 = (
    ("stage3_param_persistence_threshold", 500),
    ("stage3_max_reuse_distance", 100_000),
    ("stage3_prefetch_bucket_size", 30_000),
)
PARAMETERS = ("backbone", "experts", "adapter")
ALL_TO_ALL = "alltoall_base"  # its elements are compared by kind, as counted in `parallel.wire`
OPERATIONS = {  # by the name of torch's operator
    "allreduce": "all_reduce",
    "allgather_base": "all_gather",
    "reduce_scatter_base": "reduce_scatter",
    ALL_TO_ALL: "all_to_all",
}


class Case(NamedTuple):
    """A configuration to measure; `dense` makes every token use all experts."""

    workload: Workload
    strategy: Strategy
    dense: bool = False

    @property
    def name(self) -> str:
        """The configuration in words, such as "ZeRO 2, ep 4 all_to_all, bf16, 4 ranks"."""
        w, s = self.workload, self.strategy
        parts = [f"ZeRO {s.stage}", f"ep {s.ep_size}" + (f" {s.dispatch}" if s.ep_size > 1 else "")]
        parts += [w.precision, *(["recompute"] if s.checkpointing else []), f"{s.ranks} ranks"]
        return ", ".join(parts + ([f"{w.accumulation} micro-batches"] if w.accumulation > 1 else []))

    @property
    def routing_dependent(self) -> bool:
        """Whether the elements sent depend on the routing of each token, of which the planner has an expectation only."""
        return self.strategy.ep_size > 1 and self.strategy.dispatch != "gather" and not self.dense


class Compared(NamedTuple):
    """A predicted and a measured number, of the rank with the largest; routing-dependent elements are summed over ranks."""

    case: str
    quantity: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Error relative to the measured number."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted != 0)


def cases() -> list[Case]:
    """Return cases with ZeRO 0 to 3, replicated and spread experts, with and without recomputation, few and many experts."""
    sizes: Any = dict(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
    )
    llama = LlamaConfig(**sizes, num_hidden_layers=4)
    qwen = Qwen3Config(**sizes, num_hidden_layers=3, tie_word_embeddings=True)
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
    """Yield every predicted quantity of a case beside what all ranks measured, bytes of the parts first."""
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
    sent = {key: number for key, number in measured[0].collectives.items() if key[0] != ALL_TO_ALL}
    for what, expected, counted in (("elements", payload, sent), ("calls", calls, measured[0].calls)):
        found = {(OPERATIONS.get(name, name), ranks): number for (name, ranks), number in counted.items()}
        for key in sorted(expected.keys() | found.keys()):
            yield Compared(case.name, f"{key[0]} over {key[1]}, {what}", expected[key], found.get(key, 0))


def _compare_dispatch(case: Case, workload: Workload, measured: Sequence[Measured]) -> Iterator[Compared]:
    """Yield elements and bytes by the kinds of `parallel.wire`: of rank 0, or routing-dependent ones of all ranks."""
    sent: Mapping[str, float] = dispatch_elements(workload, case.strategy)
    if case.routing_dependent:
        sent = _from_supports(case, measured)
    else:
        measured = measured[:1]
    for kind in sorted(sent.keys() | {kind for m in measured for kind in m.wire}):
        number = sent.get(kind, 0)
        yield Compared(case.name, f"{kind}, elements", number, sum(m.wire[kind] for m in measured))
        number *= element_bytes(kind, workload)
        yield Compared(case.name, f"{kind}, bytes sent", number, sum(m.wire_bytes[kind] for m in measured))


def _from_supports(case: Case, measured: Sequence[Measured]) -> Counter[str]:
    """Return what `dispatch: auto` sends on all ranks for the supports that were measured, by kind."""
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


def summary(rows: Sequence[Compared]) -> list[dict[str, object]]:
    """Return a table row for each part in bytes and each count that differs, and one for all exact counts of a case."""
    table: list[dict[str, object]] = []
    for case in dict.fromkeys(row.case for row in rows):
        exact = 0
        for row in (row for row in rows if row.case == case):
            if row.quantity.endswith("bytes") or abs(row.predicted - row.measured) > 1e-6:
                error = f"{row.error:+.2%}"
                table.append({**row._asdict(), "error": error})
            else:
                exact += 1
        quantity = f"{exact} counts of elements and calls"
        table.append({"case": case, "quantity": quantity, "predicted": "", "measured": "", "error": "exact"})
    return table


def main() -> None:
    """Measure every case on ranks of this machine and print the comparison."""
    rows: list[Compared] = []
    by_ranks = sorted(cases(), key=lambda case: case.strategy.ranks)
    progress = tqdm(by_ranks, unit="case", leave=False)
    for size, group in itertools.groupby(progress, key=lambda case: case.strategy.ranks):
        with LocalRanks(size, timeout=600) as ranks:
            for case in group:
                rows += compare(case, ranks.run(measure, *case))
    print(f"Predicted and measured, of the rank with most; {setup()}")
    print(markdown_table(summary(rows)))
