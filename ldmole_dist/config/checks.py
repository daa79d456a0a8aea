"""Check the keys of a run config that depend on each other or on the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path

from ldmole_dist.config.adapter import check_top_k
from ldmole_dist.config.schema import TASK_CLASSES, Config, Data, Source
from ldmole_dist.errors import UserError

PACKING_ATTENTION = ("sdpa", "eager", "flash_attention_2")


def check_config(config: Config) -> None:
    """Check the keys of a config against each other.

    If a sequence classifier has no data.labels and all training sources have the same classification task, data.labels is set
    to the classes of that task.

    Raises:
        UserError: if keys contradict each other, a key that another one needs is not set, a list of sources is empty, or
            data.labels has duplicates or fewer than two entries; the message names the keys.
    """
    o, a, ep_size = config.optimisation, config.adapter, config.parallelism.ep_size
    if (o.epochs is None) == (o.max_steps is None):
        found = "unset" if o.epochs is None else "set"
        raise UserError(f"optimisation.epochs and optimisation.max_steps are both {found}; set exactly one of them")
    try:
        check_top_k(a, "adapter.")
    except ValueError as error:
        raise UserError(str(error)) from error
    common = math.gcd(*a.expert_counts)
    if common % ep_size:
        raise UserError(
            f"parallelism.ep_size={ep_size} does not divide adapter.num_experts={a.num_experts}; use one of "
            f"{_divisors(common)}"
        )
    _check_sources(config)
    _check_streaming(config.data)
    _check_packing(config)
    if config.backbone.task == "sequence_classification" and not config.data.labels:
        raise UserError("backbone.task=sequence_classification needs class names; set data.labels")
    if config.data.labels is not None and len(set(config.data.labels)) < max(2, len(config.data.labels)):
        raise UserError(
            f"data.labels={config.data.labels} must have at least two entries, all different; correct the list"
        )


def accumulation_steps(config: Config, world_size: int) -> int:
    """Return the number of micro-batches per optimizer step on each rank.

    Raises:
        UserError: if the global batch size is not a multiple of the micro-batch size times the world size.
    """
    o = config.optimisation
    per_forward = o.micro_batch_size * world_size
    if o.global_batch_size % per_forward:
        lower = o.global_batch_size // per_forward * per_forward
        fits = [n for n in (lower, lower + per_forward) if n]
        raise UserError(
            f"optimisation.global_batch_size={o.global_batch_size} is not a multiple of optimisation.micro_batch_size="
            f"{o.micro_batch_size} times {world_size} ranks; set the global batch size to {' or '.join(map(str, fits))}"
        )
    return o.global_batch_size // per_forward


def check_parallelism(config: Config, world_size: int) -> None:
    """Raise UserError if ep_size or the batch sizes of a config do not fit `world_size` ranks."""
    check_ep_size(config.parallelism.ep_size, world_size)
    accumulation_steps(config, world_size)


def check_ep_size(ep_size: int, world_size: int) -> None:
    """Raise UserError if `ep_size` does not divide `world_size`."""
    if world_size % ep_size:
        raise UserError(
            f"parallelism.ep_size={ep_size} does not divide the {world_size} ranks of this run; use one of "
            f"{_divisors(world_size)}"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _check_packing(config: Config) -> None:
    if not config.data.packing:
        return
    if config.backbone.task == "sequence_classification":
        raise UserError(
            "data.packing=true needs backbone.task=causal_lm, because a classifier reads the last token of each row; "
            "set data.packing=false"
        )
    if config.backbone.attention not in (None, *PACKING_ATTENTION):
        raise UserError(
            f"data.packing=true is not tested with backbone.attention={config.backbone.attention}; set backbone.attention "
            f"to {', '.join(PACKING_ATTENTION[:-1])} or {PACKING_ATTENTION[-1]}, or set data.packing=false"
        )


def _check_streaming(data: Data) -> None:
    if data.workers and not data.streaming:
        raise UserError(
            f"data.workers={data.workers} has no effect without data.streaming=true; set data.workers=0 or data.streaming=true"
        )
    if not data.streaming:
        return
    if not data.truncation:
        raise UserError(
            "data.streaming=true needs data.truncation=true, because rows are encoded, and their length is known, only "
            "during training; set data.truncation=true or data.streaming=false"
        )
    for source in data.train if isinstance(data.train, list) else [Source(path=data.train)]:
        if source.path is None or Path(source.path).suffix != ".jsonl":
            raise UserError(
                f"data.streaming=true reads only .jsonl files, not {source.path or source.task}; convert the data to a .jsonl "
                "file (one JSON object per line), or set data.streaming=false"
            )


def _check_sources(config: Config) -> None:
    for key, data in (("train", config.data.train), ("eval", config.data.eval)):
        sources = data if isinstance(data, list) else []
        if isinstance(data, list) and not data:
            raise UserError(f"data.{key} is an empty list; give at least one source")
        for source in sources:
            if source.task is None and source.path is None:
                raise UserError(f"data.{key}: a source has neither path nor task; set at least one of them")
            if source.answers == "text" and (source.task is None or source.task in TASK_CLASSES):
                found = f"{source.path} has no task" if source.task is None else f"{source.task} is not one"
                raise UserError(
                    f"data.{key}: answers=text needs a multiple-choice task, but {found}; set such a task, or remove "
                    "answers=text"
                )
            if source.task is not None and source.format is not None:
                raise UserError(f"data.{key}: task {source.task} defines its own format; remove format={source.format}")
        if len({source.weight is None for source in sources}) > 1:
            raise UserError(
                f"data.{key}: some sources have a weight and some do not; set it for all of them or for none"
            )
        if key == "train" and config.data.labels is None and config.backbone.task == "sequence_classification":
            classes = {TASK_CLASSES.get(source.task or "") for source in sources}
            if len(classes) == 1 and (labels := classes.pop()) is not None:
                config.data.labels = list(labels)
