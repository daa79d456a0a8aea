"""The subcommands `ldmole launch` and `ldmole doctor`."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import tempfile
from pathlib import Path

from ldmole_dist.cluster.doctor import doctor
from ldmole_dist.cluster.environment import exported_environment
from ldmole_dist.cluster.hosts import Host, describe_layout, order_for_groups, read_hostfile, select_hosts, slurm_hosts
from ldmole_dist.cluster.launch import exec_supervisor, rank_command, run_with_restarts, supervisor_command
from ldmole_dist.cluster.output import print_status
from ldmole_dist.cluster.rank_environment import inside_mpi, inside_slurm_step
from ldmole_dist.cluster.runners import LaunchSpec, check_installed, launcher_command
from ldmole_dist.config import Config, check_parallelism, load_config
from ldmole_dist.engine.ds_config import resolve_run
from ldmole_dist.errors import EXIT_EXPLAINED, UserError


def run_launch(args: argparse.Namespace) -> int:
    """Run `ldmole launch CONFIG`, and return its exit code.

    Inside mpirun the function does not return: this process becomes the supervisor of one rank.

    Raises:
        UserError: if the config or an argument is invalid, or the job cannot be started.
        KeyboardInterrupt: if a stop is requested while the checks before the start run the collectives.
    """
    config = load_config(args.config, args.overrides)
    if args.max_restarts and not config.run.save_every:
        raise UserError(f"--max-restarts {args.max_restarts} needs checkpoints to resume from; set run.save_every=N")
    if args.max_restarts and config.run.resume == "never":
        raise UserError(f"--max-restarts {args.max_restarts} contradicts run.resume=never; set run.resume=auto")
    train = ["train", args.config, *args.overrides]
    exports = exported_environment(os.environ, args.export, args.interface)
    if inside_mpi(os.environ):
        if args.dry_run:
            raise UserError(
                "--dry-run inside mpirun: the ranks are already started; run `ldmole launch --dry-run` without mpirun"
            )
        if args.max_restarts:
            raise UserError(
                "--max-restarts inside mpirun: ldmole launch cannot restart mpirun; run `ldmole launch` without mpirun, with "
                "--launcher openmpi --hostfile FILE"
            )
        exec_supervisor(rank_command(train), exports, args.interface, args.stall_minutes * 60)
    spec = create_launch_spec(args, config)
    _check_config(config, spec.world_size)
    print_status(describe_layout([*spec.hosts] * spec.nodes, config.parallelism.ep_size))
    if args.dry_run:
        job_arguments = ["--coordinator", "HOST:PORT", "--job", "NAME"]
        script = supervisor_command(rank_command(train), job_arguments, exports, spec.interface)
        with tempfile.TemporaryDirectory() as folder:
            print(shlex.join(launcher_command(spec, script, Path(folder))))
        return 0
    check_installed(spec.launcher)
    if len(spec.hosts) > 1 and not args.no_doctor and doctor(spec, exports, args.config, config):
        print_status("not started: correct the problems above, or skip the checks with --no-doctor")
        return EXIT_EXPLAINED
    return run_with_restarts(spec, rank_command(train), exports, args.stall_minutes * 60, args.max_restarts)


def run_doctor(args: argparse.Namespace) -> int:
    """Run `ldmole doctor [CONFIG]`, and return its exit code.

    Raises:
        UserError: if the config or an argument is invalid, the launcher is not installed, or the collectives cannot be started.
        KeyboardInterrupt: if a stop is requested while the collectives run.
    """
    config = None if args.config is None else load_config(args.config, args.overrides)
    spec = create_launch_spec(args, config)
    exports = exported_environment(os.environ, args.export, args.interface)
    if spec.launcher == "torchrun":
        raise UserError(
            "doctor cannot reach other hosts with --nodes; replace --nodes with --hostfile FILE, or run doctor on each host "
            "without --nodes and --launcher"
        )
    check_installed(spec.launcher)
    return EXIT_EXPLAINED if doctor(spec, exports, args.config, config) else 0


def create_launch_spec(args: argparse.Namespace, config: Config | None) -> LaunchSpec:
    """Return launcher, hosts and network of a job, selected by the arguments and the environment (GPUs, Slurm allocation).

    Args:
        args: parsed arguments of `add_arguments`.
        config: configuration of the run, whose `parallelism.ep_size` determines the order of the hosts and, without GPUs and
            --ranks, the number of ranks on this host; None for `ldmole doctor` without a config, which uses ep_size 1.

    Raises:
        UserError: if arguments are missing, invalid, without effect or contradict each other; if the hostfile or the Slurm
            allocation is invalid; or if srun has started this command once per task.
    """
    ep_size = 1 if config is None else config.parallelism.ep_size
    ranks = args.ranks or _device_count() or ep_size
    this_host = [Host("this host", tuple(range(ranks)))]
    common = {"interface": args.interface, "launcher_args": args.launcher_args, "ssh_args": args.ssh_args}
    if args.nodes is not None:
        if args.hostfile or args.include or args.exclude or args.launcher not in (None, "torchrun"):
            raise UserError(
                "--nodes uses torchrun on each host; remove --hostfile, --include, --exclude and --launcher, or remove --nodes"
            )
        if args.master_addr is None or args.node_rank is None or not 0 <= args.node_rank < args.nodes:
            raise UserError(
                f"--nodes {args.nodes} needs --master-addr ADDRESS and --node-rank I with I from 0 to {args.nodes - 1}"
            )
        master = f"{args.master_addr}:{args.port}"
        return LaunchSpec("torchrun", this_host, nodes=args.nodes, node_rank=args.node_rank, master=master, **common)
    if args.launcher == "local" and args.hostfile is not None:
        raise UserError("--launcher local runs on this host only; remove --hostfile, or use --launcher pdsh or openmpi")
    if args.launcher == "torchrun" and args.hostfile is not None:
        raise UserError(
            "--launcher torchrun does not use a hostfile; remove --hostfile and run the command on each host with --nodes, "
            "--node-rank and --master-addr, or use --launcher pdsh or openmpi"
        )
    slurm_possible = args.hostfile is None and args.launcher in (None, "slurm")
    if slurm_possible and inside_slurm_step(os.environ):
        raise UserError(
            "srun has started this command once per task; run it once, without srun, in the batch script or in a shell of "
            "salloc"
        )
    in_slurm = slurm_possible and "SLURM_JOB_ID" in os.environ
    if not in_slurm and args.hostfile is None:
        if args.launcher not in (None, "local"):
            needs = {
                "slurm": "an allocation (sbatch or salloc)",
                "torchrun": "--nodes N, --node-rank I and --master-addr ADDRESS",
            }
            need = needs.get(args.launcher, "--hostfile FILE")
            raise UserError(f"--launcher {args.launcher} needs {need}")
        if args.include or args.exclude:
            raise UserError(
                "--include and --exclude select hosts of a hostfile or of a Slurm allocation, and there is neither; set "
                "--hostfile, or remove these options and select the GPUs of this host with CUDA_VISIBLE_DEVICES"
            )
        for option, value in (("--launcher-args", args.launcher_args), ("--interface", args.interface)):
            if value:
                raise UserError(f"{option} has no effect on one host without a hostfile; remove it")
        return LaunchSpec("local", this_host)
    if args.ranks:
        raise UserError(
            "--ranks has no effect with a hostfile or in a Slurm allocation; remove it, and set the number of ranks with "
            "slots=N in the hostfile or --ntasks-per-node of sbatch"
        )
    launcher = args.launcher or ("slurm" if in_slurm else "pdsh" if shutil.which("pdsh") else "openmpi")
    hosts = slurm_hosts(os.environ) if in_slurm else read_hostfile(args.hostfile)
    hosts = select_hosts(hosts, args.include, args.exclude)
    if launcher != "slurm":  # Slurm orders the nodes itself
        hosts = order_for_groups(hosts, ep_size)
    return LaunchSpec(launcher, hosts, **common)


def _check_config(config: Config, world_size: int) -> None:
    """Check the config as every rank does at its start, so that an invalid config is reported once, before the start."""
    check_parallelism(config, world_size)
    resolve_run(config, world_size)


def _device_count() -> int:
    import torch

    return torch.cuda.device_count()
