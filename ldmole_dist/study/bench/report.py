"""Measure the time that observing the routers adds to a forward.

Usage: `python -m ldmole_dist.study.bench.report RUN_OR_ADAPTER`. The script accepts the arguments of `ldmole report`
and runs one batch with and without the observer, in turns.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.model.forward import observe_routing
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.report.arguments import add_arguments
from ldmole_dist.report.collect import Counter, batches
from ldmole_dist.report.inputs import load_model, read_data
from ldmole_dist.study.machine import setup
from ldmole_dist.study.table import markdown_table
from ldmole_dist.study.timing import median_ratio, time_in_turns, timed

TURNS = 8


def main() -> None:
    """Parse the arguments, and print the milliseconds per 1,000 tokens with and without the observer."""
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
    by_length = batches(examples, int(tokenizer.pad_token_id), size, device)
    batch = next(islice(by_length, len(examples) // size // 2, None))  # the middle batch in order of length
    counter = Counter(base.get_input_embeddings().num_embeddings, device)
    counter.begin("", batch)
    observers = {"without": None, "with": counter}
    seconds = time_in_turns(
        list(observers), TURNS, lambda name: timed(lambda: observe_routing(model, batch, observers[name]), device)
    )
    tokens = int(batch["attention_mask"].sum())
    print(
        f"{Path(args.run_or_adapter).name}, {precision}, batch {tuple(batch['input_ids'].shape)}, {tokens} tokens; {setup()}"
    )
    ratio = median_ratio(seconds["with"], seconds["without"])
    rows = [
        {"observer": name, "ms per 1,000 tokens": 1e6 * statistics.median(values) / tokens}
        for name, values in seconds.items()
    ]
    print(markdown_table(rows))
    print(f"with the observer: {ratio:.2f} times as long")


if __name__ == "__main__":
    main()
