"""`ldmole report RUN_OR_ADAPTER`: what the routers of a saved adapter do, as a page and figures."""

from __future__ import annotations

import argparse
import logging
import time
from datetime import datetime
from pathlib import Path

import torch

from ldmole_dist.errors import UserError
from ldmole_dist.io import atomic_write
from ldmole_dist.model.backbone import load_tokenizer
from ldmole_dist.model.saved import find_saved_model
from ldmole_dist.report.collect import collect
from ldmole_dist.report.html import Figure
from ldmole_dist.report.inputs import adapter_config, load_model, read_data
from ldmole_dist.report.movement import read_curves, trace_movement
from ldmole_dist.report.page import Material, key_numbers, render, sections

BATCH_SIZE = 8  # where no run says otherwise


def report(args: argparse.Namespace) -> int:
    """Run it.

    Raises:
        UserError: where the folder, the data or the output is not as it must be.
    """
    saved = find_saved_model(args.run_or_adapter, args.backbone)
    tokenizer = load_tokenizer(saved.backbone)
    data = read_data(saved, args.data, args.limit, tokenizer)
    curves = read_curves(saved.run)
    output = Path(args.output) if args.output else _default_output(saved.run, saved.name)
    _prepare(output)
    config = saved.config
    precision = args.precision or (config.parallelism.precision if config else "bf16")
    batch_size = args.batch_size or (config.optimisation.micro_batch_size if config else BATCH_SIZE)
    model = load_model(saved, precision, tokenizer)
    pad_id = int(tokenizer.pad_token_id)

    started = time.perf_counter()
    observed = collect(model, data.examples, pad_id, batch_size, "routing the data")
    seconds = time.perf_counter() - started
    every = [example for examples in data.examples.values() for example in examples]
    movement = trace_movement(model, saved, every, pad_id, batch_size)

    device = next(model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    how = f"{precision} on {where}, {1000 * seconds / int(observed.tokens_V.sum()):.2g} s for 1,000 tokens"
    material = Material(saved, adapter_config(model), data, observed, movement, curves, how)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    drawn = sections(material, tokenizer)
    written = f"Written by ldmole report on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}."
    figures = [part for section in drawn for part in section.parts if isinstance(part, Figure)]
    try:
        for figure in figures:
            atomic_write(output / f"{figure.name}.png", figure.png)
        atomic_write(output / "index.html", render(material, drawn, written))
    except OSError as error:
        raise _not_writable(output, error) from error
    for name, value in key_numbers(material):
        print(f"{name + ':':19}{value}")
    print(f"{'report:':19}{output / 'index.html'} ({len(figures)} figures, also as PNG files beside it)")
    return 0


def _default_output(run: Path | None, name: str) -> Path:
    return Path(f"report_{name}") if run is None else run / "report"


def _prepare(output: Path) -> None:
    """Make the folder, and see that it can be written before anything is computed."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_writable(output, error) from error


def _not_writable(output: Path, error: OSError) -> UserError:
    return UserError(
        f"the report cannot be written to {output}: {error.strerror or error}; make room or permissions there, or choose "
        "another folder with --output"
    )
