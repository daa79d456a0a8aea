"""The selftest: verify that training on the ranks of this machine gives the same results as training in one process.

Each case prints one line: its name and settings, the largest distance found on any rank, the tolerance, whether the case
passed, the time, and the name of the comparison (usually a tensor) with that distance. For a case that raises an error, the
distance is "error" and the last line of the error replaces the name.
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
# Rounding to bfloat16 changes a number by up to 0.4 %. The relative error of a gradient is larger if its terms nearly cancel.
BFLOAT16 = 0.25


class Case(NamedTuple):
    """A case of the selftest.

    Attributes:
        name: what the case tests, such as "gradients"; cases may share a name.
        detail: description of its settings.
        tolerance: largest distance that the function may return.
        function: function that every rank runs; it returns a dict from the name of a comparison to its distance.
        args: positional arguments of the function.
        settings: keyword arguments of the function.
    """

    name: str
    detail: str
    tolerance: float
    function: Callable[..., dict[str, float]]
    args: tuple[Any, ...] = ()
    settings: dict[str, Any] = {}


def selftest(size: int | None = None, out: Callable[[str], None] = print) -> bool:
    """Run every case and print a header, one line for each case, and a summary.

    Args:
        size: number of ranks; None uses the largest of 8, 4, 2 and 1 that is at most the number of GPUs, or 4 without GPUs.
        out: function to call with each line of the output.

    Returns:
        Whether no case raised an error or exceeded its tolerance.
    """
    size = size or _default_size()
    failures, all_cases = 0, list_cases(size)
    out(f"{'case':12} {'detail':52} {'distance':>8} {'allowed':>8}       {'s':>5}  largest at")
    with LocalRanks(size) as ranks:
        for case in all_cases:
            begun = time.perf_counter()
            try:
                distance, whose = parity.worst(ranks.run(case.function, *case.args, **case.settings))
                ok = distance <= case.tolerance
                measured = f"{distance:8.1e}"
            except Exception as error:  # the other cases still run
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
    out(f"selftest: {failures} of {len(all_cases)} cases failed; {size} ranks on {device}; {libraries}")
    return failures == 0


def list_cases(size: int) -> list[Case]:
    """Return the cases that the selftest runs on `size` ranks."""
    ep_sizes = [p for p in range(1, size + 1) if size % p == 0 and EXPERTS % p == 0]
    all_cases = [
        Case("ranks", f"{size} processes join one group", EXACT, cases.joined, (size,)),
        Case("collectives", "fp32 bf16 fp16 fp64 int64, some ranks send nothing", EXACT, cases.collectives),
    ]
    for architecture in ("llama", "qwen3"):
        for ep_size in ep_sizes:
            for checkpointing in (False, True):
                detail = f"{architecture}, ep {ep_size}, float64{', checkpointing' if checkpointing else ''}"
                all_cases.append(
                    Case("gradients", detail, FLOAT64, parity.gradients, (architecture, ep_size, checkpointing))
                )
    for mode in ("all_to_all", "gather"):  # the cases above use "auto"
        detail = f"llama, ep {ep_sizes[-1]}, float64, checkpointing, {mode}"
        all_cases.append(Case("gradients", detail, FLOAT64, parity.gradients, ("llama", ep_sizes[-1], True, mode)))
    for stage in range(4):
        for ep_size in ep_sizes:
            # DeepSpeed does not shard parameters below this threshold. All parameters of the tiny model are below its default.
            settings = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
            detail = f"ZeRO {stage}, ep {ep_size}, float32, checkpointing"
            args = ("llama", f"zero{stage}", ep_size, True)
            all_cases.append(Case("updates", detail, FLOAT32, parity.updates, args, settings))
    detail = f"qwen3, ZeRO 3, ep {ep_sizes[-1]}, float32, checkpointing"
    all_cases.append(Case("updates", detail, FLOAT32, parity.updates, ("qwen3", "zero3", ep_sizes[-1], True)))
    for ep_size in ep_sizes:
        detail = f"ep {ep_size}, float64, random routing"
        all_cases.append(Case("replay", detail, FLOAT64, cases.replay, (ep_size,)))
    for architecture in ("llama", "qwen3"):
        detail = f"{architecture}, ep {ep_sizes[-1]}, bf16 backbone, fp32 adapter"
        all_cases.append(Case("dtypes", detail, BFLOAT16, cases.half_precision, (architecture, ep_sizes[-1])))
    return all_cases


def _default_size() -> int:
    gpus = torch.cuda.device_count()
    return next((size for size in (8, 4, 2, 1) if size <= gpus), 4)
