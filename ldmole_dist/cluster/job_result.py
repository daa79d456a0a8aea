"""Result of a job, and the choice of the failure to report as its cause."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PEER, EXIT_PREEMPTED


@dataclass(frozen=True)
class Failure:
    """Failure of a rank, a launcher or the coordinator.

    Attributes:
        source: subject of the failure, such as "rank 2 on node1", "rank(s) 2, 3 on node1" or "the launcher".
        description: predicate of the sentence that starts with the source, such as "exited with code 1".
        last_lines: last lines that the rank printed.
        permanent: whether the job must not be restarted: it would fail in the same way, or a second stop was requested.
        stalled: whether ranks hang, so that their stacks must be printed.
        secondary: whether the rank reported that it failed because of another rank.
        abrupt: whether the rank was killed by SIGKILL, or lost, and could not report anything. Ranks that fail as a
            consequence may report their failures earlier.
        stop_requested: whether a stop request ended the job before there was anything to save.
    """

    source: str
    description: str
    last_lines: list[str] = field(default_factory=list)
    permanent: bool = False
    stalled: bool = False
    secondary: bool = False
    abrupt: bool = False
    stop_requested: bool = False

    def report(self) -> str:
        """Return the text that ends the output of a failed job: the failure and the last lines of the rank."""
        lines = (f"launch:   | {line}" for line in self.last_lines)
        return "\n".join([f"first failure: {self.source}: {self.description}", *lines])


@dataclass(frozen=True)
class JobResult:
    """Outcome of one attempt to run a job.

    Attributes:
        exit_code: 0, EXIT_PREEMPTED (stopped on request), EXIT_EXPLAINED (a permanent failure) or 1 (any other failure).
        failure: the failure that is reported as the cause; None if the job succeeded, or saved after a stop request.
        stop_requested: whether a stop was requested.
    """

    exit_code: int
    failure: Failure | None = None
    stop_requested: bool = False


def root_cause(failures: Sequence[Failure]) -> Failure:
    """Return the most likely cause among failures that were observed within seconds of each other.

    The order of preference is: an abrupt failure, a stop request before there was anything to save, a permanent failure, any
    other failure, and last a failure that a rank attributes to another rank. Of several failures of the same kind, the first in
    the list is returned.
    """
    return min(failures, key=lambda f: (not f.abrupt, not f.stop_requested, not f.permanent, f.secondary))


def exit_code_for(failure: Failure) -> int:
    """Return the exit code of a job that ended with a failure."""
    if failure.stop_requested:
        return EXIT_PREEMPTED
    return EXIT_EXPLAINED if failure.permanent else 1


def failure_from_exit(
    source: str, exit_code: int, last_activity: str, last_lines: list[str], out_of_memory: bool
) -> Failure:
    """Return the failure that describes the exit of a rank.

    Args:
        source: rank and host, such as "rank 2 on node1".
        exit_code: exit code as `subprocess` reports it; negative for a signal.
        last_activity: text about the last heartbeat of the rank, appended to the description.
        last_lines: last lines that the rank printed.
        out_of_memory: whether the kernel of the host has killed a process for lack of memory since the supervisor started.
    """
    description = f"exited with code {exit_code}"
    if exit_code < 0:
        names = {int(number): f" ({number.name})" for number in signal.Signals}
        description = f"was killed by signal {-exit_code}{names.get(-exit_code, '')}"
        if exit_code == -signal.SIGKILL:
            description += (
                "; the kernel of the host killed a process for lack of memory: lower optimisation.micro_batch_size or "
                "start fewer ranks on the host"
                if out_of_memory
                else "; the kernel of the host reported no lack of memory"
            )
    return Failure(
        source,
        description + last_activity,
        last_lines,
        permanent=exit_code == EXIT_EXPLAINED,
        secondary=exit_code == EXIT_PEER,
        abrupt=exit_code == -signal.SIGKILL,
    )
