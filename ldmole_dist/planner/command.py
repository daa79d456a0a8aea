"""The arguments of `ldmole plan`, and what they mean."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import UserError
from ldmole_dist.planner.presets import is_preset, load_backbone_config, preset_names

PLAN = """Says, without weights and without GPUs, what training needs (memory of each GPU by part, what goes over the wire,
FLOPs), which ZeRO stages, expert-parallel sizes, gradient checkpointing and offloads fit, and which to take. docs/planner.md"""
UNITS = {
    "": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `ldmole plan`."""
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--backbone", required=True, help=f"config.json, a folder with one, or one of {', '.join(preset_names())}"
    )
    what.add_argument("--experts", type=positive, default=8, help="E of every linear (default: %(default)s)")
    what.add_argument("--rank", type=positive, default=8, help="of every expert (default: %(default)s)")
    what.add_argument("--lambda-hidden", type=positive, default=256, help="(default: %(default)s)")
    what.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="linears to adapt (default: all seven of a layer)"
    )
    what.add_argument("--seq", type=positive, default=1024, help="tokens of a sequence (default: %(default)s)")
    what.add_argument("--micro-batch", type=positive, default=8, help="sequences of a forward (default: %(default)s)")
    what.add_argument("--accumulation", type=positive, default=1, help="micro-batches of a step (default: %(default)s)")
    what.add_argument("--answer-tokens", type=positive, help="positions with a label in a sequence (default: all)")
    what.add_argument(
        "--active", type=float, help="mean number of experts of a token (default: 2, or 1 of a single one)"
    )
    what.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    what.add_argument("--dropout", type=float, default=0.1, help="of the adapters' input (default: %(default)s)")
    what.add_argument("--no-padding", action="store_true", help="all sequences of a batch are equally long")
    where = parser.add_argument_group("what it runs on")
    where.add_argument("--gpus", required=True, type=positive)
    where.add_argument("--gpu-memory", required=True, help="such as 80GB or 79GiB")
    where.add_argument("--gpus-per-node", type=positive, default=8, help="(default: %(default)s)")
    where.add_argument("--host-memory", help="of a node, such as 1TB (default: not checked)")
    where.add_argument("--reserve", type=float, default=0.1, help="share of memory to keep free (default: %(default)s)")
    where.add_argument("--tflops", type=float, default=150.0, help="that a GPU achieves (default: %(default)s)")
    where.add_argument("--bandwidth", type=float, default=150.0, help="GB/s within a node (default: %(default)s)")
    where.add_argument("--inter-bandwidth", type=float, default=20.0, help="GB/s between nodes (default: %(default)s)")
    where.add_argument("--host-bandwidth", type=float, default=20.0, help="GB/s to host memory (default: %(default)s)")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--all", action="store_true", help="every line, those that do not fit included")
    out.add_argument("--json", action="store_true", help="everything as JSON")
    out.add_argument("--write", metavar="FOLDER", help="write run.yaml and deepspeed.json of the recommended line")
    out.add_argument("--backbone-path", metavar="PATH", help="of the weights, for --write")
    out.add_argument("--train", metavar="FILE", help="training data, for --write")
    out.add_argument("--output-dir", metavar="FOLDER", help="of the run, for --write")


def plan(args: argparse.Namespace) -> int:
    """`ldmole plan`.

    Raises:
        UserError: where something cannot be, or nothing fits.
    """
    # Imported here: they bring torch's and transformers' models with them.
    from ldmole_dist.config.adapter import LINEARS
    from ldmole_dist.planner.choose import Machine, all_lines, ordered
    from ldmole_dist.planner.reason import nothing_fits
    from ldmole_dist.planner.table import as_json, report
    from ldmole_dist.planner.workload import Workload
    from ldmole_dist.planner.write import write_configs

    machine = Machine(
        gpus=args.gpus,
        memory=parse_memory(args.gpu_memory),
        reserved=args.reserve,
        gpus_per_node=args.gpus_per_node,
        tflops=args.tflops,
        bandwidth=args.bandwidth,
        inter_bandwidth=args.inter_bandwidth,
        host_bandwidth=args.host_bandwidth,
        host_memory=None if args.host_memory is None else parse_memory(args.host_memory, "--host-memory"),
    )
    workload = Workload(
        backbone=load_backbone_config(args.backbone),
        num_experts=args.experts,
        rank=args.rank,
        lambda_hidden=args.lambda_hidden,
        target_modules=tuple(args.target_modules or LINEARS),
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        seq=args.seq,
        answer_tokens=args.answer_tokens,
        active=min(2.0, args.experts) if args.active is None else args.active,
        precision=args.precision,
        padded=not args.no_padding,
        dropout=args.dropout,
    )
    lines = ordered(all_lines(workload, machine))
    preset = is_preset(args.backbone)
    if args.json:
        print(json.dumps({"preset": preset} | as_json(args.backbone, workload, machine, lines), indent=2))
    else:
        name = f"{args.backbone} ({'preset' if preset else 'your config.json'})"
        print("\n".join(report(name, workload, machine, lines, args.all)))
    if not lines[0].fits:
        raise UserError(nothing_fits(lines[0]))
    if args.write:
        folder = Path(args.write)
        path = args.backbone_path or (args.backbone if not preset and Path(args.backbone).is_dir() else None)
        missing = write_configs(lines[0], folder, path, args.train, args.output_dir)
        if not args.json:
            print(f"\nwritten: {folder / 'run.yaml'} and {folder / 'deepspeed.json'}")
            if missing:
                print(
                    f"still to be filled in: {', '.join(missing)} (--backbone-path, --train and --output-dir do it here)"
                )
    return 0


def parse_memory(text: str, option: str = "--gpu-memory") -> int:
    """ "80GB" -> 80,000,000,000; GiB are 2^30.

    Raises:
        UserError: where it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    size = float(found[1]) * UNITS.get(found[2].upper(), 0) if found else 0.0
    if not 1 <= size < math.inf:
        raise UserError(f"{option} {text!r} is no size: write it like 80GB or 79GiB")
    return int(size)
