"""The `ldmole` command: parse arguments, call the subcommand, print its errors.

This module must be fast to import, so that help is printed at once. It imports only what the arguments need; each subcommand
imports torch, DeepSpeed and other slow packages when it is called.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ldmole_dist.cluster import arguments as cluster_arguments
from ldmole_dist.compose import command as compose_command
from ldmole_dist.errors import (
    EXIT_EXPLAINED,
    EXIT_PEER,
    EXIT_PREEMPTED,
    NonFiniteLoss,
    PeerError,
    Preempted,
    UserError,
    require_extra,
)
from ldmole_dist.evaluation import command as evaluation_command
from ldmole_dist.generation import command as generation_command
from ldmole_dist.planner import command as plan_command
from ldmole_dist.report import arguments as report_arguments
from ldmole_dist.study.bench import command as bench_command
from ldmole_dist.study.compare import command as compare_command
from ldmole_dist.study.scaling import command as scaling_command

# Arguments of `require_extra` for `report`, `compare` and `scaling`: the name of the extra, then the modules that it installs.
REPORT_EXTRA = ("report", "matplotlib", "scipy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` names. `train` and `eval` exit the process instead of returning.

    Args:
        argv: arguments after the program name; None uses those of the process.

    Returns:
        Exit code: 0 on success; EXIT_EXPLAINED after a `UserError` or `NonFiniteLoss`, whose message is printed, or if `doctor`
        or `checkpoint verify` found problems; EXIT_PEER if another rank failed; EXIT_PREEMPTED if a run was stopped by a
        signal, has saved a checkpoint and can be resumed; 1 otherwise. `launch` returns the exit code of its job.

    Raises:
        SystemExit: after `--help` and after invalid arguments, whose error argparse prints.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:  # argparse does not add arguments to a nargs="*" list if they follow an option
        more = next((getattr(args, name) for name in ("overrides", "prompts") if hasattr(args, name)), None)
        if more is None or any(argument.startswith("-") for argument in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        more += rest
    if args.call not in (_train, evaluation_command.run):
        return _call(args)
    try:
        code = _call(args)
    except Exception:
        traceback.print_exc()
        code = 1
    from ldmole_dist.cluster.exit import exit_process

    exit_process(code)


def _call(args: argparse.Namespace) -> int:
    """Call the subcommand and return the exit code. Errors of this package are printed without a traceback."""
    call: Callable[[argparse.Namespace], int] = args.call
    # Read LOCAL_RANK before the subcommand runs, because joining the process group may change the variable.
    is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        if hasattr(args, "extra"):
            require_extra(*args.extra)
        return call(args)
    except Preempted as error:
        import torch.distributed

        torch.distributed.destroy_process_group()
        if is_first_of_node:
            print(error, file=sys.stderr, flush=True)
        return EXIT_PREEMPTED
    except (UserError, NonFiniteLoss) as error:
        # In a process group, only the rank that finds a UserError raises it, and the others raise PeerError: print every
        # UserError. Before the group exists, and for a non-finite loss, all ranks raise the same error: print it once per node.
        is_alone = isinstance(error, UserError) and _in_process_group()
        if is_alone or is_first_of_node:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_EXPLAINED
    except PeerError as error:
        if is_first_of_node:
            print(f"stopped: {error}", file=sys.stderr, flush=True)
        return EXIT_PEER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return 1


def _in_process_group() -> bool:
    # Without torch there is no process group. Do not import torch here: it is slow.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ldmole", description="Fine-tune language models with LD-MoLE.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train in this process, alone or as one rank under a launcher")
    _add_config(train)
    # DeepSpeed's launcher passes --local_rank. It is ignored: LOCAL_RANK in the environment has the same value.
    train.add_argument("--local_rank", help=argparse.SUPPRESS)
    train.set_defaults(call=_train)

    launch = commands.add_parser(
        "launch",
        help="train with several ranks, on this host or on many hosts",
        description=cluster_arguments.LAUNCH_DESCRIPTION,
    )
    _add_config(launch)
    cluster_arguments.add_launch_arguments(launch)
    launch.set_defaults(call=_launch)

    doctor = commands.add_parser(
        "doctor",
        help="check the hosts of a job before it starts",
        description="Compare the hosts of a job, time collectives across them, and print each problem with its remedy.",
    )
    doctor.add_argument("config", nargs="?", help="YAML file of the run; without it, only the hosts are compared")
    doctor.add_argument("overrides", nargs="*", metavar="a.b=c", help="config values that override those of the file")
    cluster_arguments.add_arguments(doctor)
    doctor.set_defaults(call=_doctor)

    validate = commands.add_parser("validate", help="check a config without training")
    _add_config(validate)
    validate.add_argument("--ranks", type=int, metavar="N", help="number of ranks to check the config for")
    validate.add_argument(
        "--build",
        action="store_true",
        help="also build the model without its weights, and check the DeepSpeed config with DeepSpeed's own parser",
    )
    validate.set_defaults(call=_validate)

    checkpoint = commands.add_parser("checkpoint", help="verify, inspect or export a checkpoint").add_subparsers(
        required=True, metavar="WHAT"
    )
    verify = checkpoint.add_parser(
        "verify", help="check the hash of every file, and that no optimizer state is missing"
    )
    verify.add_argument("checkpoint", help="folder, such as runs/quickstart/checkpoints/step_00000030")
    verify.set_defaults(call=_checkpoint_verify)
    inspect = checkpoint.add_parser("inspect", help="print the contents of a checkpoint")
    inspect.add_argument("checkpoint", help="folder of the checkpoint")
    inspect.set_defaults(call=_checkpoint_inspect)
    export = checkpoint.add_parser("export", help="write the adapter of a checkpoint as a PEFT folder")
    export.add_argument("checkpoint", help="folder of the checkpoint")
    export.add_argument("adapter", help="folder to create")
    export.set_defaults(call=_checkpoint_export)

    evaluate = commands.add_parser("eval", help="evaluate a run or an adapter", description=evaluation_command.EVAL)
    evaluation_command.add_arguments(evaluate)

    generate = commands.add_parser(
        "generate", help="generate text with an adapter", description=generation_command.GENERATE
    )
    generation_command.add_arguments(generate)

    report = commands.add_parser(
        "report", help="analyze the routing of a run or an adapter", description=report_arguments.DESCRIPTION
    )
    report_arguments.add_arguments(report)
    report.set_defaults(call=_report, extra=REPORT_EXTRA)

    compose = commands.add_parser(
        "compose", help="create an adapter from existing LoRA adapters", description=compose_command.COMPOSE
    )
    compose_command.add_arguments(compose)

    convert = commands.add_parser("convert", help="convert a GGUF file to a model folder")
    convert.add_argument("gguf", help="GGUF file")
    convert.add_argument("folder", help="folder to create")
    convert.set_defaults(call=_convert, extra=("gguf", "gguf"))

    plan = commands.add_parser(
        "plan", help="estimate memory, communication and time of a run", description=plan_command.PLAN
    )
    plan_command.add_arguments(plan)
    plan.set_defaults(call=plan_command.plan)

    selftest = commands.add_parser("selftest", help="verify this installation: compare several ranks with one process")
    selftest.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="number of ranks (default: the largest of 8, 4, 2 and 1 that is at most the number of GPUs; 4 without GPUs)",
    )
    selftest.set_defaults(call=_selftest)

    scaling = commands.add_parser(
        "scaling", help="measure how training scales on this machine", description=scaling_command.SCALING
    )
    scaling_command.add_arguments(scaling)
    scaling.set_defaults(extra=REPORT_EXTRA)

    compare = commands.add_parser("compare", help="compare routers", description=compare_command.COMPARE)
    compare_command.add_arguments(compare)
    compare.set_defaults(extra=REPORT_EXTRA)

    bench_command.add_commands(commands.add_parser("bench", help="run a benchmark"))
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config values that override those of the file")


def _train(args: argparse.Namespace) -> int:
    from ldmole_dist.cluster.heartbeat import show_stacks
    from ldmole_dist.config import load_config

    show_stacks()
    # Load the config before the slow imports, so that its errors are reported at once.
    config = load_config(args.config, args.overrides)
    import torch.distributed

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


def _launch(args: argparse.Namespace) -> int:
    from ldmole_dist.cluster.command import run_launch

    return run_launch(args)


def _doctor(args: argparse.Namespace) -> int:
    from ldmole_dist.cluster.command import run_doctor

    return run_doctor(args)


def _validate(args: argparse.Namespace) -> int:
    from ldmole_dist.config import check_parallelism, load_config
    from ldmole_dist.engine.ds_config import check_quantization, load_ds_config, resolve_run

    config = load_config(args.config, args.overrides)
    if args.ranks is None:
        check_quantization(config, load_ds_config(config.parallelism.deepspeed))
    else:
        check_parallelism(config, args.ranks)
        resolve_run(config, args.ranks)
    if args.build:
        from ldmole_dist.model.check_build import check_build

        check_build(config, args.ranks or config.parallelism.ep_size)
    print(f"{args.config} is valid" + ("" if args.ranks is None else f" for {args.ranks} ranks"))
    return 0


def _checkpoint_verify(args: argparse.Namespace) -> int:
    from ldmole_dist.checkpoint.manifest import verify

    problems = verify(Path(args.checkpoint))
    print("\n".join(problems) if problems else f"{args.checkpoint} is complete")
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
