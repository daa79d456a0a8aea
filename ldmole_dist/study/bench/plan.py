"""Compare the planner's predictions with measurements of real engines on small models: `ldmole bench plan`.

If a quantity is only predicted or only measured, the missing value is 0.
"""

from __future__ import annotations

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

# With the default thresholds, ZeRO-3 would keep most weights of such small models gathered, and gather the others all at
# once.
SMALL_ZERO3 = (
    ("stage3_param_persistence_threshold", 500),
    ("stage3_max_reuse_distance", 100_000),
    ("stage3_prefetch_bucket_size", 30_000),
)
PARAMETERS = ("backbone", "experts", "adapter")
ALL_TO_ALL = "alltoall_base"  # only its calls are compared here; its elements are compared by kind (`parallel.wire`)
OPERATIONS = {  # name of torch's operator -> name in the planner
    "allreduce": "all_reduce",
    "allgather_base": "all_gather",
    "reduce_scatter_base": "reduce_scatter",
    ALL_TO_ALL: "all_to_all",
}


class Case(NamedTuple):
    """A configuration to measure.

    Args:
        workload: workload to train.
        strategy: number of ranks and how the training is distributed over them.
        dense: whether all experts are active for every token.
    """

    workload: Workload
    strategy: Strategy
    dense: bool = False

    @property
    def name(self) -> str:
        """Description of the configuration, such as "ZeRO 2, ep 4 all_to_all, bf16, 4 ranks"."""
        w, s = self.workload, self.strategy
        parts = [f"ZeRO {s.stage}", f"ep {s.ep_size}" + (f" {s.dispatch}" if s.ep_size > 1 else "")]
        parts += [w.precision, *(["recompute"] if s.checkpointing else []), f"{s.ranks} ranks"]
        return ", ".join(parts + ([f"{w.accumulation} micro-batches"] if w.accumulation > 1 else []))

    @property
    def routing_dependent(self) -> bool:
        """Whether the number of elements sent depends on each token's routing; the planner predicts only its mean."""
        return self.strategy.ep_size > 1 and self.strategy.dispatch != "gather" and not self.dense


class Compared(NamedTuple):
    """A predicted and a measured value of one quantity.

    The measured value is the maximum over ranks for memory, the sum over ranks for all that the dispatch of a
    routing-dependent case sends, and that of rank 0 for everything else.

    Args:
        case: name of the case.
        quantity: name of the quantity with its unit, such as "gradients, bytes".
        predicted: predicted value.
        measured: measured value.
    """

    case: str
    quantity: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction, positive if the prediction is too large.

        If the measured value is 0, the error is 0 for a correct prediction and 1 for a wrong one.
        """
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted != 0)


def cases() -> list[Case]:
    """Return the cases to measure.

    They cover ZeRO stages 0 to 3, replicated experts and experts spread over ranks, runs with and without gradient
    checkpointing, 8 and 16 experts, and 1 and 2 micro-batches.
    """
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
    """Yield each quantity of a case with its predicted and its measured value.

    The order is: bytes of parameters, gradients, optimizer state and activations; elements and bytes that the dispatch
    sends, by kind; elements, then calls, of each collective.

    Args:
        case: configuration that was measured.
        measured: measurements of all ranks, by rank. Unless `case.dense`, the prediction uses rank 0's measured
            active experts per token; what the dispatch of a routing-dependent case sends is predicted from the measured
            supports of all ranks.
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
    sent = {key: number for key, number in measured[0].collectives.items() if key[0] != ALL_TO_ALL}
    for what, expected, counted in (("elements", payload, sent), ("calls", calls, measured[0].calls)):
        found = {(OPERATIONS.get(name, name), ranks): number for (name, ranks), number in counted.items()}
        for key in sorted(expected.keys() | found.keys()):
            yield Compared(case.name, f"{key[0]} over {key[1]}, {what}", expected[key], found.get(key, 0))


def _compare_dispatch(case: Case, workload: Workload, measured: Sequence[Measured]) -> Iterator[Compared]:
    """Yield the dispatch's elements and bytes by kind: summed over ranks if routing-dependent, otherwise of rank 0."""
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
    """Return the number of elements that `dispatch: auto` sends for the measured supports, by kind, summed over ranks."""
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
    """Return the rows of the printed table for one case.

    There is one row per part of the memory, one per count whose prediction is wrong, and one with the number of counts
    that are predicted exactly. Counts are elements, bytes sent and calls.
    """
    shown = [row for row in rows if row.quantity.endswith("bytes") or abs(row.predicted - row.measured) > 1e-6]
    exact = f"{len(rows) - len(shown)} counts of elements, bytes sent and calls"
    last = {"case": rows[0].case, "quantity": exact, "predicted": "", "measured": "", "error": "exact"}
    return [*({**row._asdict(), "error": f"{row.error:+.2%}"} for row in shown), last]


def main() -> None:
    """Measure every case with processes on this machine and print the comparison."""
    table: list[dict[str, object]] = []
    for size in (2, 4):
        with LocalRanks(size, timeout=600) as ranks:
            for case in tqdm([c for c in cases() if c.strategy.ranks == size], unit="case", leave=False):
                table += summary(list(compare(case, ranks.run(measure, *case))))
    print(f"Predicted and measured values; memory is that of the rank with the most; {setup()}")
    print(markdown_table(table))
