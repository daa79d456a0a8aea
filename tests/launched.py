"""Training runs as a launcher starts them: one process for each rank, to be signalled and waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from ldmole_dist.distributed import free_port

TRAIN = Path(__file__).parents[1] / "launch" / "train.py"


class Launched:
    """`size` ranks of launch/train.py; whatever is left of them is ended on exit.

    Args:
        config: of the run.
        overrides: of the config, for all ranks.
        size: number of ranks.
        rank_overrides: more of them, by rank.
    """

    def __init__(
        self, config: Path, *overrides: str, size: int = 2, rank_overrides: dict[int, list[str]] | None = None
    ) -> None:
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.ranks = [
            subprocess.Popen(
                [
                    *(sys.executable, str(TRAIN), f"--local_rank={rank}", str(config), *overrides),
                    *(rank_overrides or {}).get(rank, []),
                ],
                env=os.environ | common | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Launched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """As kill -9."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()

    def wait(self, timeout: float) -> tuple[list[int], str]:
        """Exit codes and what all ranks printed."""
        outputs = [rank.communicate(timeout=timeout)[0] for rank in self.ranks]
        return [rank.returncode for rank in self.ranks], "\n".join(outputs)

    @property
    def running(self) -> bool:
        """Whether no rank has ended."""
        return all(rank.poll() is None for rank in self.ranks)
