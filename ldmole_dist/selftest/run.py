"""The selftest: whether this installation, with its devices and libraries, trains as one process would.

One line for each case: what was run, the largest distance found on any rank and whose it is, the tolerance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from ldmole_dist.selftest import cases, parity
from ldmole_dist.selftest.local_ranks import LocalRanks
from ldmole_dist.selftest.tiny import EXPERTS

EXACT, FLOAT64, FLOAT32 = 0.0, 1e-12, 1e-4
BFLOAT16 = 0.25  # one rounding is 0.004; a tensor whose gradients nearly cancel shows it many times over


class Case(NamedTuple):
    """A function for every rank, which returns distances, and how large they may be."""

    name: str
    detail: str
    tolerance: float
    function: Callable[..., dict[str, float]]
    args: tuple[Any, ...] = ()
    settings: dict[str, Any] = {}


def selftest(size: int | None = None, out: Callable[[str], None] = print) -> bool:
    """Run every case and print a table of them.

    Args:
        size: number of ranks; by default one for each GPU (a power of 2, at most 8), or 4 on a machine without.
        out: gets the lines.

    Returns:
        Whether all cases were within their tolerances.
    """
    size = size or _default_size()
    failures, plan = 0, list_cases(size)
    out(f"{'case':12} {'detail':52} {'distance':>8} {'allowed':>8}       {'s':>5}  largest at")
    with LocalRanks(size) as ranks:
        for case in plan:
            begun = time.perf_counter()
            try:
                distance, whose = parity.worst(ranks.run(case.function, *case.args, **case.settings))
                ok = distance <= case.tolerance
                measured = f"{distance:8.1e}"
            except Exception as error:  # of any kind: it is this case's result, and the others go on
                ok, measured, whose = False, f"{'error':>8}", str(error).strip().splitlines()[-1]
            failures += not ok
            seconds = time.perf_counter() - begun
            verdict = "ok" if ok else "FAIL"
            whose = whose.removeprefix("base_model.").replace(".default", "")
            out(
                f"{case.name:12} {case.detail:52} {measured} {case.tolerance:8.1e} {verdict:>5} {seconds:5.1f}  {whose}"
            )
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "peft"))
    on_gpu = torch.cuda.device_count() >= size
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    out(f"selftest: {failures} of {len(plan)} cases failed; {size} ranks on {device}; {libraries}")
    return failures == 0


def list_cases(size: int) -> list[Case]:
    """What the selftest runs on `size` ranks."""
    ep_sizes = [p for p in range(1, size + 1) if size % p == 0 and EXPERTS % p == 0]
    plan = [
        Case("ranks", f"{size} processes join one group", EXACT, cases.joined, (size,)),
        Case("collectives", "fp32 bf16 fp16 fp64 int64, some send nothing", EXACT, cases.collectives),
    ]
    for architecture in ("llama", "qwen3"):
        for ep_size in ep_sizes:
            for checkpointing in (False, True):
                detail = f"{architecture}, ep {ep_size}, float64{', checkpointing' if checkpointing else ''}"
                plan.append(
                    Case("gradients", detail, FLOAT64, parity.gradients, (architecture, ep_size, checkpointing))
                )
    for mode in ("all_to_all", "gather"):  # above: "auto"
        detail = f"llama, ep {ep_sizes[-1]}, float64, checkpointing, {mode}"
        plan.append(Case("gradients", detail, FLOAT64, parity.gradients, ("llama", ep_sizes[-1], True, mode)))
    for stage in range(4):
        for ep_size in ep_sizes:
            # At stage 3 DeepSpeed leaves small parameters whole, and here all are small.
            settings = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
            detail = f"ZeRO {stage}, ep {ep_size}, float32, checkpointing"
            args = ("llama", f"zero{stage}", ep_size, True)
            plan.append(Case("updates", detail, FLOAT32, parity.updates, args, settings))
    detail = f"qwen3, ZeRO 3, ep {ep_sizes[-1]}, float32, checkpointing"
    plan.append(Case("updates", detail, FLOAT32, parity.updates, ("qwen3", "zero3", ep_sizes[-1], True)))
    for ep_size in ep_sizes:
        detail = f"ep {ep_size}, float64, routing that never repeats"
        plan.append(Case("replay", detail, FLOAT64, cases.replay, (ep_size,)))
    for architecture in ("llama", "qwen3"):
        detail = f"{architecture}, ep {ep_sizes[-1]}, bf16 backbone, fp32 adapter"
        plan.append(Case("dtypes", detail, BFLOAT16, cases.half_precision, (architecture, ep_sizes[-1])))
    return plan


def _default_size() -> int:
    gpus = torch.cuda.device_count()
    return next((size for size in (8, 4, 2, 1) if size <= gpus), 4)
