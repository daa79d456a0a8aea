"""The arguments of `ldmole launch` and `ldmole doctor`, and what they mean."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import tempfile
from pathlib import Path

import torch

from ldmole_dist.cli_arguments import positive
from ldmole_dist.cluster.doctor import doctor
from ldmole_dist.cluster.environment import exported
from ldmole_dist.cluster.hosts import Host, choose, describe_layout, keep_groups_within, read_hostfile, slurm_hosts
from ldmole_dist.cluster.launch import attempts, become_rank, rank_command, supervised
from ldmole_dist.cluster.output import say
from ldmole_dist.cluster.rank_environment import inside_mpi, inside_slurm_step
from ldmole_dist.cluster.runners import LAUNCHERS, Start, find_launcher, launcher_command
from ldmole_dist.config import Config, check_parallelism, load_config
from ldmole_dist.errors import EXIT_EXPLAINED, UserError

DEFAULT_PORT = 29500
LAUNCH = """Starts a run with DeepSpeed's runners (pdsh, Open MPI, Slurm), torchrun or on this host, and prints the command it
uses. When a rank dies or stalls, all ranks of all hosts are ended at once, and the last lines name the first that failed."""




def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say where a job runs."""
    where = parser.add_argument_group("where")
    where.add_argument("--hostfile", help="lines 'NAME slots=N'; see launch/hostfile.example")
    where.add_argument(
        "--include", default="", metavar="NAME[:SLOT,...]@...", help="use only these of its hosts and slots"
    )
    where.add_argument("--exclude", default="", metavar="NAME[:SLOT,...]@...", help="leave these out")
    where.add_argument("--nodes", type=positive, help="without ssh: the same command is given on so many hosts, with")
    where.add_argument("--node-rank", type=int, help="the number of this one, from 0, and")
    where.add_argument("--master-addr", help="where the others reach number 0")
    where.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="on it, with --nodes; and the one after (default: %(default)s)"
    )
    where.add_argument(
        "--ranks", type=positive, help="on a host without a hostfile; default: one for each GPU, or ep_size on the CPU"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        help="default: slurm inside an allocation, pdsh or else openmpi with a hostfile",
    )
    how.add_argument("--interface", help="network interface between hosts; default: the one that leads to them")
    how.add_argument(
        "--export", action="append", default=[], metavar="NAME[=VALUE]", help="further environment variable for ranks"
    )
    how.add_argument(
        "--ssh-args", default=os.environ.get("PDSH_SSH_ARGS_APPEND", ""), help="such as '-F my_ssh_config'"
    )
    how.add_argument("--launcher-args", default="", help="for pdsh, mpirun, srun or torchrun")


def launch(args: argparse.Namespace) -> int:
    """`ldmole launch CONFIG`."""
    config = load_config(args.config, args.overrides)
    if args.max_restarts and not config.run.save_every:
        raise UserError(f"--max-restarts {args.max_restarts} needs checkpoints to go on from: set run.save_every=N")
    if args.max_restarts and config.run.resume == "never":
        raise UserError(f"--max-restarts {args.max_restarts} and run.resume=never contradict each other")
    train = ["train", args.config, *args.overrides]
    exports = exported(os.environ, args.export, args.interface)
    if inside_mpi(os.environ):
        if args.dry_run:
            raise UserError("--dry-run inside mpirun: the ranks have been started already")
        if args.max_restarts:
            raise UserError(
                "--max-restarts inside mpirun: nothing is left to restart; use --launcher openmpi --hostfile FILE"
            )
        become_rank(rank_command(train), exports, args.interface, args.stall_minutes * 60)
    start = find_start(args, config)
    _check(config, start.size)
    say(describe_layout([*start.hosts] * start.nodes, config.parallelism.ep_size))
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            script = supervised(
                rank_command(train), ["--watch", "HOST:PORT", "--job", "NAME"], exports, start.interface
            )
            print(shlex.join(launcher_command(start, script, Path(folder))))
        return 0
    find_launcher(start.launcher)
    if len(start.hosts) > 1 and not args.no_doctor and doctor(start, exports, args.config, config):
        say("not started: see the remedies above, or start it with --no-doctor")
        return EXIT_EXPLAINED
    return attempts(start, rank_command(train), exports, args.stall_minutes * 60, args.max_restarts)


def examine(args: argparse.Namespace) -> int:
    """`ldmole doctor [CONFIG]`."""
    config = None if args.config is None else load_config(args.config, args.overrides)
    start = find_start(args, config)
    exports = exported(os.environ, args.export, args.interface)
    if start.launcher == "torchrun":
        raise UserError(
            "ldmole doctor needs a way to the hosts: give --hostfile FILE, or call it on each without --nodes"
        )
    find_launcher(start.launcher)
    return EXIT_EXPLAINED if doctor(start, exports, args.config, config) else 0


def find_start(args: argparse.Namespace, config: Config | None) -> Start:
    """How and where to start, from the arguments and from what this process is in.

    Raises:
        UserError: where they contradict each other or something is missing.
    """
    ep_size = 1 if config is None else config.parallelism.ep_size
    ranks = args.ranks or torch.cuda.device_count() or ep_size
    here = [Host("this host", tuple(range(ranks)))]
    common = {"interface": args.interface, "launcher_args": args.launcher_args, "ssh_args": args.ssh_args}
    if args.nodes is not None:
        if args.hostfile or args.launcher not in (None, "torchrun"):
            raise UserError("--nodes starts torchrun on each host by hand; give it without --hostfile and --launcher")
        if args.master_addr is None or args.node_rank is None or not 0 <= args.node_rank < args.nodes:
            raise UserError(f"--nodes {args.nodes} needs --master-addr ADDRESS and --node-rank 0 to {args.nodes - 1}")
        master = f"{args.master_addr}:{args.port}"
        return Start("torchrun", here, nodes=args.nodes, node_rank=args.node_rank, master=master, **common)
    if inside_slurm_step(os.environ) and args.hostfile is None and args.launcher in (None, "slurm"):
        raise UserError(
            "srun has started this already: call `ldmole launch` once, from the batch script or salloc, without srun"
        )
    in_slurm = "SLURM_JOB_ID" in os.environ and args.hostfile is None and args.launcher in (None, "slurm")
    if not in_slurm and args.hostfile is None:
        if args.launcher not in (None, "local"):
            where = "an allocation (sbatch, salloc)" if args.launcher == "slurm" else "--hostfile FILE"
            raise UserError(f"--launcher {args.launcher} needs {where}")
        if args.include or args.exclude:
            raise UserError(
                "--include and --exclude choose among the hosts of a --hostfile; here, set CUDA_VISIBLE_DEVICES"
            )
        if args.launcher_args:
            raise UserError("--launcher-args is for pdsh, mpirun, srun and torchrun, none of which is used on one host")
        return Start("local", here)
    if args.ranks:
        raise UserError(
            "--ranks is of a host without a hostfile: the hostfile, or Slurm's --ntasks-per-node, says how many"
        )
    launcher = args.launcher or ("slurm" if in_slurm else "pdsh" if shutil.which("pdsh") else "openmpi")
    hosts = choose(slurm_hosts(os.environ) if in_slurm else read_hostfile(args.hostfile), args.include, args.exclude)
    if launcher != "slurm":  # which has an order of its own
        hosts = keep_groups_within(hosts, ep_size)
    return Start(launcher, hosts, **common)


def _check(config: Config, size: int) -> None:
    from ldmole_dist.engine.ds_config import resolve_run  # imports deepspeed, which takes its time

    check_parallelism(config, size)
    resolve_run(config, size)
