"""Measure what observing the routers adds to a forward: `python -m ldmole_dist.study.bench.report RUN_OR_ADAPTER`."""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ldmole_dist.method.context import Observer
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.model.forward import observe_routing
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.report.arguments import add_arguments
from ldmole_dist.report.collect import Counter, batches
from ldmole_dist.report.inputs import load_model, read_data

PAIRS = 8


def main() -> None:
    """Forward the same batches with and without the observer in turn, after a pair that does not count, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    saved = find_saved_model(args.run_or_adapter, args.backbone)
    tokenizer = load_tokenizer(saved.backbone)
    data = read_data(saved, args.data, args.limit, tokenizer)
    precision = args.precision or (saved.config.parallelism.precision if saved.config else "bf16")
    model = load_model(saved, precision, tokenizer)
    base: Any = model.get_base_model()
    device = next(base.parameters()).device
    examples = [example for of_domain in data.examples.values() for example in of_domain]
    size = args.batch_size or 16
    middle = batches(examples, int(tokenizer.pad_token_id), size, device)  # the batch of middling lengths
    batch = next(islice(middle, len(examples) // size // 2, None))
    counter = Counter(base.get_input_embeddings().num_embeddings, device)
    counter.begin("", batch)
    tokens = int(batch["attention_mask"].sum())
    with_observer, without = [], []
    for _ in range(PAIRS + 1):
        without.append(_seconds(model, batch, None, device))
        with_observer.append(_seconds(model, batch, counter, device))
    ratios = [a / b for a, b in zip(with_observer[1:], without[1:], strict=True)]
    clock = "wall clock" if device.type == "cuda" else f"CPU time, {torch.get_num_threads()} threads"
    print(
        f"{Path(args.run_or_adapter).name}, {precision} on {device.type}, a batch of {tuple(batch['input_ids'].shape)} "
        f"with {tokens} tokens, {clock}: {1e6 * statistics.median(without[1:]) / tokens:.0f} ms for 1,000 tokens; with "
        f"the observer {statistics.median(ratios):.2f} times as much ({min(ratios):.2f} to {max(ratios):.2f} in {PAIRS} pairs)"
    )


def _seconds(model: Any, batch: Any, observer: Observer | None, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait_for(device)
    started = clock()
    observe_routing(model, batch, observer)
    _wait_for(device)
    return clock() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
