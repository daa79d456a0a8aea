"""`ldmole compare`: execute the missing runs of a comparison and write its page."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import EXIT_PREEMPTED, UserError

if TYPE_CHECKING:
    from ldmole_dist.config import Config
    from ldmole_dist.study.compare.rows import Row
    from ldmole_dist.study.folder import StudyFolder

COMPARE = """Train an adapter with each router, and a plain LoRA with about as many parameters, on the same data with the
same budget and seeds. Write tables of the results to OUTPUT/routers.md. To resume an interrupted comparison, run the
same command again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole compare`."""
    parser.add_argument("config", help="YAML config of all runs, such as launch/configs/compare.yaml")
    text = "values that override those of the config in all runs"
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help=text)
    text = "path of vaderSentiment-3.3.2.tar.gz; trains on WordNet and VADER instead of the config's data"
    parser.add_argument("--vader", metavar="ARCHIVE", help=text)
    parser.add_argument("--output", default="runs/compare", help="folder of the comparison (default: %(default)s)")
    parser.add_argument("--methods", help="comma-separated methods to run (default: all routers and plain LoRA)")
    text = "number of seeds; uses seeds 0 to N - 1 (default: %(default)s)"
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help=text)
    parser.add_argument("--jobs", type=positive, help="concurrent runs (default: one per GPU, or one per CPU core)")
    parser.add_argument(
        "--page-only", action="store_true", help="write the page of the finished runs without running others"
    )
    parser.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    """Execute the missing runs, unless --page-only is set, and write the page.

    Returns:
        0, or `EXIT_PREEMPTED` after Ctrl-C or SIGTERM; the same command then resumes the comparison.

    Raises:
        UserError: if the config, an option, the data or the folder cannot be used, a run fails, or no run has finished.
    """
    from ldmole_dist.io import atomic_write, write_errors
    from ldmole_dist.study.compare.page import page
    from ldmole_dist.study.compare.rows import Row
    from ldmole_dist.study.folder import StudyFolder

    folder = Path(args.output)
    if args.page_only:
        study = StudyFolder(folder, None, Row)
    else:
        base = _base(args, folder)
        study = StudyFolder(folder, _about(args, base), Row)
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            _run(args, study, base)
        except KeyboardInterrupt:
            print(
                f"interrupted: {folder} holds the finished runs; run the same command again to resume", file=sys.stderr
            )
            return EXIT_PREEMPTED
        finally:
            signal.signal(signal.SIGTERM, previous)
    if not study.rows():
        raise UserError(f"{study.table} holds no finished run; run the comparison without --page-only")
    with write_errors(str(folder)):
        atomic_write(folder / "routers.md", page(study))
    print(f"page: {folder / 'routers.md'}")
    return 0


def _base(args: argparse.Namespace, folder: Path) -> Config:
    """Return the config of all runs.

    With --vader, also write the data to `folder`/data.
    """
    from ldmole_dist.config import load_config
    from ldmole_dist.study.compare.data import ALL_LABELS, write_data

    overrides = list(args.overrides)
    if args.vader is not None:
        train, test = write_data(args.vader, folder / "data")
        overrides += [f"data.train={train}", f"data.eval={test}", f"data.labels={ALL_LABELS}"]
    # Checkpoints are needed only to resume an interrupted run, so each run keeps only its last one.
    return load_config(args.config, [*overrides, f"run.output_dir={folder}", "run.save_every=10", "run.keep_last=1"])


def _about(args: argparse.Namespace, base: Config) -> dict[str, str]:
    """Return a description of what the results depend on: machine, library versions, data, settings, code,
    path of the config, and command.

    Data and settings are given by the first 12 hexadecimal digits of their SHA-256.

    Raises:
        UserError: if data.eval is not set, or a data file cannot be read.
    """
    from ldmole_dist.config import dump_config
    from ldmole_dist.data.sources import as_sources
    from ldmole_dist.study.machine import machine

    if base.data.eval is None:
        raise UserError("data.eval is not set, but a comparison needs evaluation data; set data.eval=FILE")
    contents = hashlib.sha256()
    for source in [*as_sources(base.data.train), *as_sources(base.data.eval)]:
        contents.update(repr(source).encode())
        try:
            contents.update(b"" if source.path is None else Path(source.path).read_bytes())
        except OSError as error:
            raise UserError(
                f"cannot read the data file {source.path} ({error.strerror}); check data.train and data.eval"
            ) from error
    settings = hashlib.sha256(dump_config(base).encode()).hexdigest()[:12]
    vader = [] if args.vader is None else ["--vader", Path(args.vader).name]
    command = shlex.join(["launch/compare_routers.py", args.config, *args.overrides, *vader])
    about = {"data": contents.hexdigest()[:12], "settings": settings, "code": _commit()}
    return machine() | about | {"config": args.config, "command": command}


def _run(args: argparse.Namespace, study: StudyFolder[Row], base: Config) -> None:
    """Execute the missing runs of the methods and seeds that the arguments name."""
    import torch

    from ldmole_dist.study.compare.grid import run_missing
    from ldmole_dist.study.compare.methods import DEFAULT, METHODS
    from ldmole_dist.study.machine import cores

    names = args.methods.split(",") if args.methods else list(DEFAULT)
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"--methods: unknown method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    jobs = args.jobs or torch.cuda.device_count() or cores()
    # Run all methods with one seed before the next seed: an interrupted comparison then lacks methods only for
    # the last seeds.
    run_missing(study, base, [(name, seed) for seed in range(args.seeds) for name in names], jobs)


def _commit() -> str:
    """Return the git commit of this package, 12 hexadecimal digits; "unknown" without git or outside a repository.

    If a tracked file is modified, ", with changes" is appended.
    """
    try:
        head, changes = (
            subprocess.check_output(["git", *command], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True)
            for command in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + (", with changes" if changes else "")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
