"""`ldmole report RUN_OR_ADAPTER`: write a page and figures about the routing of a saved adapter."""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch

from ldmole_dist.io import atomic_write, write_errors
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.report import html
from ldmole_dist.report.collect import collect
from ldmole_dist.report.history import read_routing_log, trace_history
from ldmole_dist.report.inputs import adapter_config, load_model, read_data
from ldmole_dist.report.page import ReportData, sections, summary

BATCH_SIZE = 8  # sequences per forward for an adapter without a run
LEAD = (
    "Routing of an LD-MoLE adapter: how many experts each token uses, which ones, and how this changed during training."
)


def report(args: argparse.Namespace) -> int:
    """Write the report and print its summary.

    Returns:
        Exit code 0.

    Raises:
        UserError: If the run or adapter, the backbone, the data or the output folder cannot be used, or a checkpoint or log of
            the run is damaged.
    """
    saved = find_saved_model(args.run_or_adapter, args.backbone)
    tokenizer = load_tokenizer(saved.backbone)
    data = read_data(saved, args.data, args.limit, tokenizer)
    records = read_routing_log(saved.run)
    output = Path(args.output or (saved.run / "report" if saved.run else f"report_{saved.name}"))
    writing = f"the report in --output {output}"
    with write_errors(writing):  # fail here rather than after routing the data
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    config = saved.config
    precision = args.precision or (config.parallelism.precision if config else "bf16")
    batch_size = args.batch_size or (config.optimisation.micro_batch_size if config else BATCH_SIZE)
    model = load_model(saved, precision, tokenizer)
    pad_id = int(tokenizer.pad_token_id)

    started = time.perf_counter()
    observed = collect(model, data.examples, pad_id, batch_size)
    seconds = time.perf_counter() - started
    examples = [example for of_domain in data.examples.values() for example in of_domain]
    history = trace_history(model, saved, examples, pad_id, batch_size)

    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    setup = f"{precision}, {name}, {1000 * seconds / int(observed.tokens_V.sum()):.2g} s per 1,000 tokens"
    contents = ReportData(saved, adapter_config(model), data, observed, history, records, setup)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # hide its warning for each missing font
    drawn = sections(contents, tokenizer)
    footer = f"Written by ldmole report on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}."
    figures = [part for section in drawn for part in section.parts if isinstance(part, html.Figure)]
    with write_errors(writing):
        for figure in figures:
            atomic_write(output / f"{figure.name}.png", figure.png)
        atomic_write(output / "index.html", html.page(f"Routing report: {saved.name}", LEAD, drawn, footer))
    for key, value in summary(contents):
        print(f"{key + ':':24}{value}")
    print(f"{'report:':24}{output / 'index.html'} ({len(figures)} figures, also as PNG files)")
    return 0
