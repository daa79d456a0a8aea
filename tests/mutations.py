"""Break the code in one place after another and check that the tests notice: `python tests/mutations.py [NAME...]`.

Each mutation replaces one line in a copy of the repository and runs the tests that are meant to catch it. The exit code is 0 if
every mutation makes a test fail. `launch/nightly.sh mutations` runs all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One defect.

    Args:
        name: what is broken.
        file: relative to ldmole_dist/.
        old: text that occurs once in the file.
        new: its replacement.
        tests: arguments for pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "gradient of Sparsegen",
        "method/sparsegen.py",
        "grad_z = (grad - mean).masked_fill(~support, 0)",
        "grad_z = grad.masked_fill(~support, 0)",
        "tests/method/test_sparsegen.py",
    ),
    Mutation(
        "token mask of the auxiliary losses",
        "method/context.py",
        "return self._mask[:, -shape[-1] :].reshape(-1) != 0",
        "return None",
        "tests/method/test_context.py",
    ),
    Mutation(
        "replay of the decision in a recomputed forward",
        "method/context.py",
        "return region.next_decision(owner) if region is not None and region.replaying else None",
        "return None",
        "tests/method tests/parallel",
    ),
    Mutation(
        "counts that ranks exchange before a dispatch",
        "parallel/exchange.py",
        "dist.all_to_all_single(received, counts_PC.contiguous(), group=group)",
        "dist.all_to_all_single(received, counts_PC.flip(0).contiguous(), group=group)",
        "tests/parallel/test_dispatch.py",
    ),
    Mutation(
        "counter of elements sent",
        "parallel/exchange.py",
        "counts_PC.numel() - counts_PC.shape[1]",
        "counts_PC.numel()",
        "tests/parallel tests/planner/test_plan_accuracy.py",
    ),
    Mutation(
        "shift of the labels",
        "loss.py",
        "F.pad(labels[:, 1:], (0, 1), value=IGNORED)",
        "F.pad(labels, (0, 0), value=IGNORED)",
        "tests/training tests/integrations",
    ),
    Mutation(
        "a collective that the failing rank skips",
        "distributed.py",
        "if dist.is_initialized() and dist.get_world_size() > 1:\n        errors",
        "if dist.is_initialized() and dist.get_world_size() > 1 and own is None:\n        errors",
        "tests/engine/test_startup.py",
    ),
    Mutation(
        "second Adam moment in checkpoints",
        "engine/optimizer_state.py",
        "{kind: mapping.get_hp_fragment(key) for kind, key in kinds.items()}",
        "{kind: mapping.get_hp_fragment(key and 'exp_avg') for kind, key in kinds.items()}",
        "tests/checkpoint/test_topologies.py",
    ),
    Mutation(
        "step at which a resumed run continues",
        "training/trainer.py",
        "range(self.first_step + 1, self.last_step + 1),",
        "range(1, self.last_step + 1),",
        "tests/training/test_resume.py",
    ),
    Mutation(
        "experts of other ranks in an exported adapter",
        "tuner/saving.py",
        "self.parallel.all_gather(value) if is_expert_tensor(name) else value",
        "value",
        "tests/training/test_export.py",
    ),
    Mutation(
        "fail-fast after a rank has exited",
        "cluster/coordinator.py",
        "elif status.exit_code not in (0, EXIT_PREEMPTED):",
        "elif status.exit_code is None:",
        "tests/cluster/test_coordinator.py",
    ),
    Mutation(
        "examples that a rank trains on",
        "data/batches.py",
        "return micro_batches[rank :: self.world_size]",
        "return micro_batches[:: self.world_size]",
        "tests/data/test_batches.py",
    ),
]


def is_caught(mutation: Mutation) -> bool:
    """Return whether a test fails with the mutation applied."""
    with tempfile.TemporaryDirectory(prefix="mutation.") as folder:
        copy = Path(folder)
        for name in ("ldmole_dist", "tests", "launch", "ds_configs", "docs", "examples"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("*.py")]:
            shutil.copy(path, copy)
        file = copy / "ldmole_dist" / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.name}: {mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times"
            )
        file.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not nightly", *mutation.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1800)
        # 1: a test failed. Other codes mean that the tests could not run.
        if done.returncode not in (0, 1):
            output = done.stdout[-2000:] + done.stderr[-2000:]
            raise SystemExit(f"{mutation.name}: pytest exited with {done.returncode}\n{output}")
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        print(
            f"{'caught' if failed else 'MISSED'}: {mutation.name}: {failed[0].split(' - ')[0] if failed else ''}",
            flush=True,
        )
        return bool(failed)


if __name__ == "__main__":
    chosen = [mutation for mutation in MUTATIONS if not sys.argv[1:] or mutation.name in sys.argv[1:]]
    missed = sum(not is_caught(mutation) for mutation in chosen)
    sys.exit(1 if missed else 0)
