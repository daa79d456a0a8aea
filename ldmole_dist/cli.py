"""The `ldmole` command: parses, calls, prints."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ldmole_dist.cli_arguments import positive
from ldmole_dist.cluster import command
from ldmole_dist.cluster.exit import exit_process
from ldmole_dist.cluster.heartbeat import show_stacks
from ldmole_dist.compose import command as compose_command
from ldmole_dist.errors import (
    EXIT_EXPLAINED,
    EXIT_PEER,
    EXIT_PREEMPTED,
    NonFiniteLoss,
    PeerError,
    Preempted,
    UserError,
)
from ldmole_dist.evaluation import command as evaluation_command
from ldmole_dist.generation import command as generation_command
from ldmole_dist.planner import command as planning
from ldmole_dist.report import arguments as report_arguments
from ldmole_dist.study.bench import command as bench
from ldmole_dist.study.compare import command as compare_command
from ldmole_dist.study.scaling import command as scaling_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; `train` and `eval` do not return, but end the process.

    Returns:
        0; EXIT_EXPLAINED where something failed that the message explains; EXIT_PEER where the message is another rank's;
        EXIT_PREEMPTED where a run was asked to end, has saved and goes on when it is started again; 1 otherwise.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:  # argparse does not take up a list again after an option
        more = next((getattr(args, name) for name in ("overrides", "prompts") if hasattr(args, name)), None)
        if more is None or any(argument.startswith("-") for argument in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        more += rest
    if args.call not in (_train, evaluation_command.run):
        return _explained(args)
    try:
        code = _explained(args)
    except Exception:
        traceback.print_exc()
        code = 1
    exit_process(code)


def _explained(args: argparse.Namespace) -> int:
    """Call the subcommand; of errors that a user can act on, only the message is printed."""
    call: Callable[[argparse.Namespace], int] = args.call
    # Before it joins the others, which may number its device anew.
    speaks_for_its_node = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return call(args)
    except Preempted as error:
        torch.distributed.destroy_process_group()
        if speaks_for_its_node:
            print(error, file=sys.stderr, flush=True)
        return EXIT_PREEMPTED
    except (UserError, NonFiniteLoss) as error:
        # Once the ranks are together, a UserError is raised on the rank that found it and a PeerError on the others; before,
        # and for a loss that all have in common, one rank of every node speaks.
        together = isinstance(error, UserError) and torch.distributed.is_initialized()
        if together or speaks_for_its_node:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_EXPLAINED
    except PeerError as error:
        if speaks_for_its_node:
            print(f"stopped: {error}", file=sys.stderr, flush=True)
        return EXIT_PEER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ldmole", description="Fine-tune language models with LD-MoLE.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on one process, or on those of a launcher (launch/train.py)")
    train.add_argument("config", help="YAML file of the run")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    train.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # DeepSpeed's launcher passes it; the environment says it too
    train.set_defaults(call=_train)

    launch = commands.add_parser(
        "launch", help="train with several ranks, on this host or on many hosts", description=command.LAUNCH_DESCRIPTION
    )
    launch.add_argument("config", help="YAML file of the run")
    launch.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    launch.add_argument("--dry-run", action="store_true", help="print the launcher command without running it")
    launch.add_argument(
        "--max-restarts",
        type=positive,
        default=0,
        metavar="N",
        help="maximum number of restarts from the last checkpoint after a failure (default: %(default)s)",
    )
    launch.add_argument(
        "--stall-minutes",
        type=float,
        default=10.0,
        metavar="M",
        help="minutes without progress of a rank after which the run counts as failed (default: %(default)s)",
    )
    launch.add_argument("--no-doctor", action="store_true", help="skip the checks of the hosts before the start")
    command.add_arguments(launch)
    launch.set_defaults(call=command.run_launch)

    doctor = commands.add_parser(
        "doctor",
        help="check the hosts of a job before it starts",
        description="Compare the hosts of a job, time collectives across them, and print each problem with its remedy.",
    )
    doctor.add_argument("config", nargs="?", help="YAML file of the run; without it, only the hosts are compared")
    doctor.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    command.add_arguments(doctor)
    doctor.set_defaults(call=command.run_doctor)

    validate = commands.add_parser("validate", help="check a config without training")
    validate.add_argument("config", help="YAML file of the run")
    validate.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the file")
    validate.add_argument("--ranks", type=int, help="also check that it can run on so many ranks")
    validate.set_defaults(call=_validate)

    checkpoint = commands.add_parser("checkpoint", help="look at checkpoints").add_subparsers(
        required=True, metavar="WHAT"
    )
    verify = checkpoint.add_parser("verify", help="check every file's hash and that nothing is missing")
    verify.add_argument("checkpoint", help="folder, such as runs/quickstart/checkpoints/step_00000030")
    verify.set_defaults(call=_checkpoint_verify)
    inspect = checkpoint.add_parser("inspect", help="say what is in it")
    inspect.add_argument("checkpoint", help="folder")
    inspect.set_defaults(call=_checkpoint_inspect)
    export = checkpoint.add_parser("export", help="make the portable adapter from it")
    export.add_argument("checkpoint", help="folder")
    export.add_argument("adapter", help="folder to make")
    export.set_defaults(call=_checkpoint_export)

    evaluate = commands.add_parser("eval", help="evaluate a run or an adapter", description=evaluation_command.EVAL)
    evaluation_command.add_arguments(evaluate)

    generate = commands.add_parser(
        "generate", help="continue prompts with an adapter", description=generation_command.GENERATE
    )
    generation_command.add_arguments(generate)

    report = commands.add_parser(
        "report", help="what the routers of a run or an adapter do", description=report_arguments.DESCRIPTION
    )
    report_arguments.add_arguments(report)
    report.set_defaults(call=_report)

    compose = commands.add_parser(
        "compose", help="an adapter of existing LoRA adapters", description=compose_command.COMPOSE
    )
    compose_command.add_arguments(compose)

    convert = commands.add_parser("convert", help="make a model folder from a GGUF file")
    convert.add_argument("gguf", help="GGUF file")
    convert.add_argument("folder", help="folder to make")
    convert.set_defaults(call=_convert)

    plan = commands.add_parser("plan", help="what training needs, before anybody runs it", description=planning.PLAN)
    planning.add_arguments(plan)
    plan.set_defaults(call=planning.plan)

    selftest = commands.add_parser("selftest", help="check this installation: many ranks against one process")
    selftest.add_argument("--ranks", type=int, help="number of ranks; default: one for each GPU, or 4 on the CPU")
    selftest.set_defaults(call=_selftest)

    scaling = commands.add_parser("scaling", help="how training scales here", description=scaling_command.SCALING)
    scaling_command.add_arguments(scaling)

    compare = commands.add_parser("compare", help="routers against each other", description=compare_command.COMPARE)
    compare_command.add_arguments(compare)

    bench.add_commands(commands.add_parser("bench", help="measure"))
    return parser


# Each command imports what it needs when it is called: validating a config must not wait for DeepSpeed.


def _train(args: argparse.Namespace) -> int:
    from ldmole_dist.config import load_config

    show_stacks()
    config = load_config(args.config, args.overrides)
    from ldmole_dist.training.run import train

    result = train(config)
    torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        out = config.run.output_dir
        print(", ".join(f"{name} {value:.4f}" for name, value in result.items()) or "trained")
        print(f"adapter:     {out}/adapter")
        python = shlex.quote(sys.executable)
        print(f"TensorBoard: {python} -m tensorboard.main --logdir {out}/tensorboard")
        print(f"generate:    {python} -m ldmole_dist.cli generate {out}/adapter 'YOUR PROMPT'")
    return 0


def _validate(args: argparse.Namespace) -> int:
    from ldmole_dist.config import check_parallelism, load_config

    config = load_config(args.config, args.overrides)
    from ldmole_dist.engine.ds_config import load_ds_config, resolve_run

    if args.ranks is None:
        load_ds_config(config.parallelism.deepspeed)
    else:
        check_parallelism(config, args.ranks)
        resolve_run(config, args.ranks)
    print(f"{args.config} is valid" + ("" if args.ranks is None else f" for {args.ranks} ranks"))
    return 0


def _checkpoint_verify(args: argparse.Namespace) -> int:
    from ldmole_dist.checkpoint.manifest import verify

    problems = verify(Path(args.checkpoint))
    print("\n".join(problems) if problems else f"{args.checkpoint} is whole")
    return EXIT_EXPLAINED if problems else 0


def _checkpoint_inspect(args: argparse.Namespace) -> int:
    from ldmole_dist.checkpoint.inspect import print_table

    print_table(Path(args.checkpoint))
    return 0


def _checkpoint_export(args: argparse.Namespace) -> int:
    from ldmole_dist.checkpoint.export import export_checkpoint

    export_checkpoint(Path(args.checkpoint), Path(args.adapter))
    print(f"adapter: {args.adapter}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from ldmole_dist.report.command import report

    return report(args)


def _convert(args: argparse.Namespace) -> int:
    from ldmole_dist.model.backbone import convert_gguf

    convert_gguf(args.gguf, args.folder)
    return 0


def _selftest(args: argparse.Namespace) -> int:
    from ldmole_dist.selftest.run import selftest

    return 0 if selftest(args.ranks) else 1


if __name__ == "__main__":
    sys.exit(main())
