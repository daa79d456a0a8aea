"""`ldmole plan`: arguments and output. Imports that take seconds are inside `plan`, because the parser does not need them."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

from ldmole_dist.cli_arguments import positive
from ldmole_dist.errors import UserError
from ldmole_dist.planner.presets import is_preset, load_backbone_config, preset_names

PLAN = """Estimate memory, traffic and FLOPs of a training step for every ZeRO stage, expert-parallel size, gradient
checkpointing and offload setting, without weights or GPUs. List the configurations that fit, and recommend one. See
docs/planner.md."""
UNITS = {"": 1, "B": 1}
UNITS |= {f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGT", start=1)}
UNITS |= {f"{prefix}IB": 2 ** (10 * power) for power, prefix in enumerate("KMGT", start=1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ldmole plan`."""
    default = "(default: %(default)s)"
    workload = parser.add_argument_group("workload").add_argument
    names = ", ".join(preset_names())
    workload("--backbone", required=True, help=f"model: a config.json, a folder with one, or one of {names}")
    workload("--experts", type=positive, default=8, help=f"experts per linear {default}")
    workload("--rank", type=positive, default=8, help=f"LoRA rank of each expert {default}")
    workload("--lambda-hidden", type=positive, default=256, help=f"hidden units of the lambda-MLP {default}")
    workload(
        "--target-modules", nargs="+", metavar="NAME", help="linears to adapt (default: the seven of a Llama layer)"
    )
    workload("--seq", type=positive, default=1024, help=f"tokens per sequence {default}")
    workload("--micro-batch", type=positive, default=8, help=f"sequences per forward on one rank {default}")
    workload("--accumulation", type=positive, default=1, help=f"micro-batches per optimizer step {default}")
    workload(
        "--answer-tokens",
        type=positive,
        help="number of positions per sequence whose logits are computed (default: all)",
    )
    workload("--active", type=float, help="mean number of active experts per token (default: 2, or 1 with --experts 1)")
    workload(
        "--precision",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help=f"precision of backbone and activations {default}",
    )
    workload("--quantization", choices=("nf4", "int8"), help="quantization of the frozen linears (default: none)")
    workload("--dropout", type=float, default=0.1, help=f"dropout probability of the adapters' input {default}")
    workload("--no-padding", action="store_true", help="assume that all sequences of a batch have the same length")
    machine = parser.add_argument_group("machine").add_argument
    machine("--gpus", required=True, type=positive, help="number of GPUs")
    machine("--gpu-memory", required=True, help="memory per GPU, such as 80GB or 79GiB")
    machine("--gpus-per-node", type=positive, default=8, help=f"GPUs per node {default}")
    machine("--host-memory", help="host memory per node, such as 1TB (default: not checked)")
    machine("--reserve", type=float, default=0.1, help=f"fraction of GPU memory to keep free {default}")
    machine("--tflops", type=float, default=150.0, help=f"achieved TFLOP/s per GPU {default}")
    machine("--bandwidth", type=float, default=150.0, help=f"GB/s per GPU within a node {default}")
    machine("--inter-bandwidth", type=float, default=20.0, help=f"GB/s per GPU between nodes {default}")
    machine("--host-bandwidth", type=float, default=20.0, help=f"GB/s between GPU and host memory {default}")
    output = parser.add_argument_group("output").add_argument
    output("--all", action="store_true", help="list all configurations, including those that do not fit")
    output("--json", action="store_true", help="print JSON")
    output(
        "--write", metavar="FOLDER", help="write the recommended configuration to FOLDER as run.yaml and deepspeed.json"
    )
    output("--backbone-path", metavar="PATH", help="backbone.path in run.yaml (default: --backbone if it is a folder)")
    output("--train", metavar="FILE", help="data.train in run.yaml: training data")
    output("--output-dir", metavar="FOLDER", help="run.output_dir in run.yaml: output folder of the run")


def plan(args: argparse.Namespace) -> int:
    """Print the estimates and the recommendation, and write configs with `--write`.

    Returns:
        Exit code 0.

    Raises:
        UserError: If an argument is invalid, no candidate fits, or the configs cannot be written.
    """
    from ldmole_dist.config.adapter import LINEARS
    from ldmole_dist.planner.candidates import Machine, all_candidates, best_first
    from ldmole_dist.planner.reasons import nothing_fits
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
        lora_rank=args.rank,
        lambda_hidden=args.lambda_hidden,
        target_modules=tuple(args.target_modules or LINEARS),
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        seq=args.seq,
        answer_tokens=args.answer_tokens,
        active=min(2.0, args.experts) if args.active is None else args.active,
        precision=args.precision,
        quantization=args.quantization,
        padded=not args.no_padding,
        dropout=args.dropout,
    )
    candidates = best_first(all_candidates(workload, machine))
    preset = is_preset(args.backbone)
    if args.json:
        print(json.dumps({"preset": preset} | as_json(args.backbone, workload, machine, candidates), indent=2))
    else:
        name = f"{args.backbone} ({'preset' if preset else 'config.json'})"
        print("\n".join(report(name, workload, machine, candidates, args.all)))
    if not candidates[0].fits:
        raise UserError(nothing_fits(candidates[0]))
    if args.write:
        folder = Path(args.write)
        path = args.backbone_path or (args.backbone if not preset and Path(args.backbone).is_dir() else None)
        missing = write_configs(candidates[0], folder, path, args.train, args.output_dir)
        if not args.json:
            print(f"\nwritten: {folder / 'run.yaml'}, {folder / 'deepspeed.json'}")
            if missing:
                print(f"still to set in run.yaml: {', '.join(missing)}")
    return 0


def parse_memory(text: str, option: str = "--gpu-memory") -> int:
    """Return a memory size in bytes: 80GB is 80 x 10^9, 80GiB is 80 x 2^30, 80 is 80 bytes.

    Args:
        text: Size with an optional unit, in upper or lower case.
        option: Option that the error message names.

    Raises:
        UserError: If the text is not a finite size of at least one byte.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    size = float(found[1]) * UNITS.get(found[2].upper(), 0) if found else 0.0
    if not 1 <= size < math.inf:
        raise UserError(f"{option} {text!r} is not a positive memory size; write it like 80GB or 79GiB.")
    return int(size)
