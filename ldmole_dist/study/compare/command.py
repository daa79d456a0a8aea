"""`ldmole compare`: run what is missing of methods x seeds, then write the table."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import EXIT_PREEMPTED, UserError

COMPARE = """Trains every router, and plain LoRA with as many parameters, on the same data with the same budget and the same
seeds, and writes a table with the spread over seeds, OUTPUT/routers.md. Interrupted, the same command goes on where it
stopped."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldmole compare`."""
    parser.add_argument("config", help="YAML file that all runs start from, such as launch/configs/compare.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file, in all runs"
    )
    parser.add_argument(
        "--vader",
        metavar="ARCHIVE",
        help="vaderSentiment-3.3.2.tar.gz: train on WordNet and VADER, not on the config's data",
    )
    parser.add_argument("--output", default="runs/compare", help="folder of the comparison (default: %(default)s)")
    parser.add_argument("--methods", help="some of the methods, with commas (default: all routers and plain LoRA)")
    parser.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=positive, help="runs at a time (default: one for each GPU or each core)")
    parser.add_argument("--page-only", action="store_true", help="run nothing, write the table of what is there")
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Run a comparison.

    Returns:
        0, or EXIT_PREEMPTED where it was interrupted and goes on when it is started again.

    Raises:
        UserError: for a value that cannot be had, a folder that cannot be used, or a run that failed.
    """
    from ldmole_dist.io import atomic_write, write_errors
    from ldmole_dist.study.compare.page import page
    from ldmole_dist.study.compare.store import Store

    folder = Path(args.output)
    if args.page_only:
        store = Store(folder, None)
    else:
        store = _store(args, folder)
        usual = signal.signal(signal.SIGTERM, _interrupt)
        try:
            _run(args, store)
        except KeyboardInterrupt:
            print(f"interrupted: {folder} holds what is finished, and the same command goes on", file=sys.stderr)
            return EXIT_PREEMPTED
        finally:
            signal.signal(signal.SIGTERM, usual)
    if not store.rows():
        raise UserError(f"{store.table} holds no finished run")
    with write_errors(str(folder)):
        atomic_write(folder / "routers.md", page(store))
    print(f"table: {folder / 'routers.md'}")
    return 0


def _store(args: argparse.Namespace, folder: Path) -> Any:
    from ldmole_dist.config import dump_config
    from ldmole_dist.data.sources import as_sources
    from ldmole_dist.study.compare.store import Store, commit
    from ldmole_dist.study.machine import machine

    base = _base(args, folder)
    contents = hashlib.sha256()
    if base.data.eval is None:
        raise UserError("data.eval is missing: without it nothing can be compared")
    for source in [*as_sources(base.data.train), *as_sources(base.data.eval)]:
        contents.update(repr(source).encode())
        try:
            contents.update(b"" if source.path is None else Path(source.path).read_bytes())
        except OSError as error:
            raise UserError(f"data file {source.path}: {error.strerror}; check data.train and data.eval") from error
    settings = hashlib.sha256(dump_config(base).encode()).hexdigest()[:12]
    about = machine() | {"data": contents.hexdigest()[:12], "settings": settings, "code": commit()}
    vader = [] if args.vader is None else ["--vader", Path(args.vader).name]
    script = ["launch/compare_routers.py", args.config, *args.overrides, *vader]
    return Store(folder, about | {"config": args.config, "command": shlex.join(script)})


def _base(args: argparse.Namespace, folder: Path) -> Any:
    from ldmole_dist.config import load_config
    from ldmole_dist.study.compare.data import ALL_LABELS, write_data

    overrides = list(args.overrides)
    if args.vader is not None:
        train, test = write_data(args.vader, folder / "data")
        overrides += [f"data.train={train}", f"data.eval={test}", f"data.labels={ALL_LABELS}"]
    # Checkpoints are for going on after an interruption.
    return load_config(args.config, [*overrides, f"run.output_dir={folder}", "run.save_every=10", "run.keep_last=1"])


def _run(args: argparse.Namespace, store: Any) -> None:
    import torch

    from ldmole_dist.study.compare.grid import Cell, run_missing
    from ldmole_dist.study.compare.methods import DEFAULT, METHODS

    names = args.methods.split(",") if args.methods else list(DEFAULT)
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"--methods {','.join(unknown)} are not known: choose from {', '.join(METHODS)}")
    jobs = args.jobs or torch.cuda.device_count() or len(os.sched_getaffinity(0))
    # Seed by seed: what is there after an interruption can be compared.
    cells = [Cell(name, seed) for seed in range(args.seeds) for name in names]
    run_missing(store, _base(args, store.folder), cells, jobs)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
