"""launch/slurm.sbatch with a stub in place of Slurm (slurm_stub.py); these tests never ran on a real cluster."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from ldmole_dist.errors import EXIT_PREEMPTED
from tests.cluster.test_two_hosts import EXACT, Job, assert_equals, hosts, reference, wait_for  # noqa: F401
from tests.cluster.two_hosts import NAMES, TwoHosts, processes_of
from tests.small_run import make_config, make_folder

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]


class SlurmJob(Job):
    """Batch script that runs on the first host of an allocation."""

    def __init__(self, hosts: TwoHosts, folder: Path, *arguments: str) -> None:  # noqa: F811
        for name in ("srun", "scontrol", "squeue", "sinfo"):
            stub = hosts.folder / name
            stub.write_text(f"#!{sys.executable}\n" + (Path(__file__).parent / "slurm_stub.py").read_text())
            stub.chmod(0o755)
        self.folder, self.output = folder, folder / "output.txt"
        # The variables that sbatch sets for the batch script. It sets SLURM_PROCID too, although no step runs yet.
        variables = {
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "ldmole[0-1]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_TASKS_PER_NODE": "2(x2)",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_STUB_FOLDER": str(hosts.folder),
            "PATH": f"{hosts.folder}:{os.environ['PATH']}",
        }
        spooled = folder / "slurm_script"  # Slurm runs a copy of the script
        spooled.write_text((ROOT / "launch" / "slurm.sbatch").read_text())
        command = ["bash", str(spooled), str(folder / "config.yaml"), *arguments]
        self.process = hosts.start(NAMES[0], command, self.output, **variables)


def test_training_equals_one_process(hosts: TwoHosts, reference: Path, tmp_path: Path) -> None:  # noqa: F811
    make_folder(tmp_path)
    make_config(tmp_path, **EXACT, parallelism={"deepspeed": "zero3", "ep_size": 4})
    with SlurmJob(hosts, tmp_path) as job:
        assert job.wait(150) == 0, job.text
        assert "doctor: no problems found" in job.text and "0, 1 on ldmole0 (10.77.31.1); 2, 3 on ldmole1" in job.text
        assert not processes_of(tmp_path)
    assert_equals(tmp_path / "run" / "adapter", reference)


def test_signal_before_the_time_limit_saves_and_requeues(hosts: TwoHosts, tmp_path: Path) -> None:  # noqa: F811
    make_folder(tmp_path)
    make_config(tmp_path, optimisation={"max_steps": 5000})
    with SlurmJob(hosts, tmp_path, "--no-doctor") as job:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, job)
        job.process.send_signal(signal.SIGTERM)  # as Slurm does for --signal=B:TERM@300
        assert job.wait(60) == EXIT_PREEMPTED, job.text
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert (hosts.folder / "scontrol.log").read_text() == "requeue 77\n"
