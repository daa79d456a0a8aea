"""What an optimizer step of a cell consists of, by the planner (`planner`): the amounts that rates are fitted to."""

from __future__ import annotations

from ldmole_dist.planner.flops import flops
from ldmole_dist.planner.shapes import shapes_of
from ldmole_dist.planner.traffic import DISPATCH, bytes_sent, collective_calls
from ldmole_dist.planner.workload import Strategy, Workload
from ldmole_dist.study.scaling.cells import ANSWERS, LAMBDA_HIDDEN, Cell

UNITS = {
    "frozen model and recomputation": "FLOP",
    "router, lambda-MLP, experts": "FLOP",
    "sent for experts": "byte",
    "sent by ZeRO": "byte",
    "collectives": "call",
    "decoder layers": "call",
    "trained parameters": "parameter",
    "constant": "step",
}


def terms(cell: Cell, experts_per_token: float, cores: int | None) -> dict[str, float]:
    """Amounts of one rank and optimizer step, by the names of UNITS.

    Args:
        cell: settings.
        experts_per_token: active ones.
        cores: that the ranks share, each computing with one at most: ranks beyond them wait for a core with all that they
            do, so every amount counts ranks / cores times. None where each has a device of its own.
    """
    workload, strategy = planned(cell, experts_per_token, on_cpu=cores is not None)
    compute, sent = flops(workload, strategy), bytes_sent(workload, strategy)
    adapter = sum(compute[part] for part in ("router", "lambda_mlp", "experts"))
    for_experts = sum(number for kind, number in sent.items() if kind in DISPATCH)
    shapes = shapes_of(workload)
    amounts = (
        sum(compute.values()) - adapter,
        adapter,
        for_experts,
        sum(sent.values()) - for_experts,
        sum(collective_calls(workload, strategy).values()),
        float(cell.layers * cell.accumulation),
        shapes.dense() + shapes.experts() / cell.ep_size,
        1.0,
    )
    crowd = max(1.0, cell.ranks / cores) if cores else 1.0
    return {name: crowd * amount for name, amount in zip(UNITS, amounts, strict=True)}


def planned(cell: Cell, experts_per_token: float, on_cpu: bool) -> tuple[Workload, Strategy]:
    """The cell as the planner has it."""
    workload = Workload(
        cell.backbone(),
        num_experts=cell.experts,
        lora_rank=cell.lora_rank,
        lambda_hidden=LAMBDA_HIDDEN,
        micro_batch=cell.micro_batch,
        accumulation=cell.accumulation,
        seq=cell.seq,
        answer_tokens=ANSWERS,
        active=experts_per_token,
        precision=cell.precision,  # type: ignore[arg-type]  # checked with the cell
        padded=False,
        dropout=0.0,
        on_cpu=on_cpu,
    )
    dispatch = cell.dispatch
    return workload, Strategy(cell.ranks, cell.stage, cell.ep_size, dispatch)  # type: ignore[arg-type]
