"""Commands and environment variables of `ldmole launch`, and its errors."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ldmole_dist.cli import main
from ldmole_dist.cluster.environment import exported_environment
from ldmole_dist.cluster.hosts import Host
from ldmole_dist.cluster.runners import LaunchSpec, device_environment, launcher_command, launcher_environment
from ldmole_dist.errors import EXIT_EXPLAINED, UserError

CONFIG = "launch/configs/quickstart.yaml"
BATCH = "optimisation.global_batch_size=128"
SCRIPT = ["entry.py", "--coordinator", "a:1", "--", "python", "train.py", "config.yaml"]
SPECIAL_ARGUMENTS = [
    "a=b",
    "100%h",
    "two 100%h",
    "data.labels=[ x, y]",
    "it's",
    'say "x"',
    "$HOME",
    "two $HOME `id` \\ \"quoted\" 'single'",
    "a;b",
    "*",
    "",
]


@pytest.fixture(autouse=True)
def outside_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PDSH_SSH_ARGS_APPEND"):
        monkeypatch.delenv(name, raising=False)


def launch(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["launch", CONFIG, *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def hostfile(folder: Path, text: str = "a slots=4\nb slots=4\n") -> str:
    (folder / "hostfile").write_text(text)
    return str(folder / "hostfile")


def test_dry_run_prints_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = launch(capsys, "--dry-run", "--ranks", "2", "optimisation.max_steps=1")
    argv = shlex.split(out)
    assert code == 0 and "-m deepspeed.launcher.runner" in out and "--num_accelerators 2" in out
    assert argv[-4:] == ["ldmole_dist.cli", "train", CONFIG, "optimisation.max_steps=1"]
    assert "expert-parallel groups of 2 ranks: all 1 within a host" in err


def test_overrides_are_accepted_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = launch(capsys, "run.seed=1", "--ranks", "2", "optimisation.max_steps=1", "--dry-run")
    assert shlex.split(out)[-2:] == ["run.seed=1", "optimisation.max_steps=1"]
    with pytest.raises(SystemExit):
        main(["launch", CONFIG, "--ranks", "2", "--no-such-option"])
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--launcher", "pdsh"], "--launcher pdsh needs --hostfile"),
        (["--launcher", "torchrun"], "--launcher torchrun needs --nodes N"),
        (
            ["--launcher", "torchrun", "--hostfile", "launch/hostfile.example"],
            "--launcher torchrun does not use a hostfile; remove --hostfile",
        ),
        (["--launcher", "local", "--hostfile", "launch/hostfile.example"], "--launcher local runs on this host only"),
        (["--nodes", "2"], "--nodes 2 needs --master-addr ADDRESS and --node-rank I with I from 0 to 1"),
        (["--nodes", "2", "--node-rank", "2", "--master-addr", "a"], "I from 0 to 1"),
        (["--include", "a"], "select hosts of a hostfile"),
        (["--nodes", "2", "--node-rank", "0", "--master-addr", "a", "--exclude", "b"], "remove --hostfile, --include"),
        (["--ranks", "3"], "parallelism.ep_size=2 does not divide the 3 ranks"),
        (["--max-restarts", "1"], "set run.save_every=N"),
        (["--max-restarts", "1", "run.save_every=1", "run.resume=never"], "contradicts"),
        (["--export", "HF_TOKEN"], "process lists"),
        (
            ["--hostfile", "launch/hostfile.example", "--launcher", "pdsh", "--ranks", "4"],
            "--ranks has no effect with a hostfile or in a Slurm allocation",
        ),
        (["--launcher-args=-v"], "--launcher-args has no effect on one host"),
        (["--interface", "lo"], "--interface has no effect on one host"),
        (["--hostfile", "none", "--launcher", "pdsh"], "none"),
    ],
)
def test_invalid_arguments_raise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    code, _, err = launch(capsys, "--dry-run", *arguments)
    assert code == EXIT_EXPLAINED and message in err and err.count("error: ") == 1


def test_launch_inside_srun_raises(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = launch(capsys, "--dry-run")
    assert code == EXIT_EXPLAINED and "in the batch script" in err


def test_nodes_uses_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand = ["--nodes", "2", "--node-rank", "1", "--master-addr", "a", "--ranks", "4", "--dry-run", BATCH]
    code, out, err = launch(capsys, *by_hand)
    assert code == 0 and "-m torch.distributed.run --nnodes 2 --node-rank 1 --nproc-per-node 4" in out
    assert "--master-addr a --master-port 29500" in out and "8 rank(s)" in err and "all 4 within a host" in err


def commands(spec: LaunchSpec, folder: Path) -> str:
    return shlex.join(launcher_command(spec, SCRIPT, folder))


@pytest.fixture
def paths_without_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's pdsh runner does not support spaces, and the checkout may have one in its path."""
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("paths_without_spaces")
def test_pdsh_command_and_environment(tmp_path: Path) -> None:
    spec = LaunchSpec("pdsh", [Host("a", (0, 2)), Host("b", (1,))], ssh_args="-p 2222")
    assert spec.world_size == 3
    command = commands(spec, tmp_path)
    assert "--launcher pdsh" in command and "--include a:0,2@b:1" in command and command.endswith(shlex.join(SCRIPT))
    assert (tmp_path / "hostfile").read_text() == "a slots=3\nb slots=2\n"
    environment = launcher_environment(spec, {"MLFLOW_TRACKING_PASSWORD": "x", "PATH": "/bin"})
    assert environment == {"PATH": "/bin", "DS_ENV_FILE": "/nowhere", "PDSH_SSH_ARGS_APPEND": "-p 2222"}


@pytest.mark.usefixtures("paths_without_spaces")
def test_pdsh_preserves_special_arguments(tmp_path: Path) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    argv = launcher_command(LaunchSpec("pdsh", [Host("a", (0,))]), [*SCRIPT, *SPECIAL_ARGUMENTS], tmp_path)
    assert "100%%h" in argv  # pdsh turns %% into %, and %h into the name of the host
    runner = PDSHRunner(parse_args(argv[3:]), "")  # without "python -m deepspeed.launcher.runner"
    sent = " ".join(runner.parse_user_args()).replace("%%", "%")  # as pdsh passes it to ssh, which passes it to a shell
    arrived = subprocess.run(["sh", "-c", f"printf '%s\\n' {sent}"], capture_output=True, text=True, check=True).stdout
    assert arrived.split("\n")[:-1] == [*SCRIPT[1:], *SPECIAL_ARGUMENTS]


def test_cuda_visible_devices_reaches_the_ranks_of_this_host(tmp_path: Path) -> None:
    spec = LaunchSpec("local", [Host("here", (0, 1))])
    environ = {"CUDA_VISIBLE_DEVICES": "2,3"}  # DeepSpeed's launcher overwrites it with 0,1
    assert device_environment(spec, environ) == environ and "CUDA_VISIBLE_DEVICES" not in launcher_environment(
        spec, environ
    )
    assert device_environment(LaunchSpec("torchrun", [Host("here", (0, 1))], nodes=2), environ) == environ
    assert device_environment(LaunchSpec("pdsh", [Host("a", (0, 1))]), environ) == {}


def test_openmpi_and_slurm_commands(tmp_path: Path) -> None:
    hosts = [Host("a", (0, 1)), Host("b", (0, 1))]
    command = commands(
        LaunchSpec("openmpi", hosts, ssh_args="-F config", interface="ib0", launcher_args="-x A=1"), tmp_path
    )
    for text in ("--map-by slot --bind-to none", "btl_tcp_if_include ib0", "plm_ssh_agent", "-x A=1"):
        assert text in command
    assert (tmp_path / "hostfile").read_text() == "a slots=2\nb slots=2\n"
    command = commands(LaunchSpec("slurm", hosts), tmp_path)
    assert (
        "--ntasks-per-node=2 --distribution=block --kill-on-bad-exit=1 --mpi=none --nodelist=a,b --nodes=2" in command
    )
    for launcher in ("openmpi", "slurm"):
        with pytest.raises(UserError, match="always uses a host's first slots"):
            commands(LaunchSpec(launcher, [Host("a", (1, 2))]), tmp_path)
    with pytest.raises(UserError, match="same number of ranks on each node"):
        commands(LaunchSpec("slurm", [Host("a", (0, 1)), Host("b", (0,))]), tmp_path)


def test_exported_environment_is_an_explicit_list_without_secrets() -> None:
    environ = {
        "NCCL_DEBUG": "INFO",
        "NCCL_SOCKET_IFNAME": "ib0",
        "HF_HOME": "/models",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "4",
        "HF_TOKEN": "secret",
        "WANDB_API_KEY": "secret",
        "NCCL_SECRET": "secret",
        "HOME": "/home/me",
        "MINE": "here",
    }
    assert exported_environment(environ, [], None).keys() == {
        "NCCL_DEBUG",
        "NCCL_SOCKET_IFNAME",
        "HF_HOME",
        "TOKENIZERS_PARALLELISM",
        "OMP_NUM_THREADS",
    }
    assert "NCCL_SOCKET_IFNAME" not in exported_environment(environ, [], "eth0")
    assert (
        exported_environment(environ, ["MINE", "OTHER=a=b"], None).items() >= {"MINE": "here", "OTHER": "a=b"}.items()
    )
    for name in ("WANDB_API_KEY", "HF_TOKEN=x", "DB_PASSWORD=x"):
        with pytest.raises(UserError, match="process lists"):
            exported_environment(environ, [name], None)
    with pytest.raises(UserError, match="--export NOTHING: the variable is not set"):
        exported_environment(environ, ["NOTHING"], None)
