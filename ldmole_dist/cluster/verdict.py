"""How a job ended, and who failed first."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PEER


@dataclass(frozen=True)
class Failure:
    """What the watch saw fail.

    Attributes:
        who: "rank 2 on node1", "ranks 2, 3 on node1", "the launcher".
        how: what became of it.
        lines: the last that it printed.
        final: whether starting again could not help.
        stalled: whether ranks hang, so that their stacks tell something.
        follows: whether it failed because another had.
    """

    who: str
    how: str
    lines: list[str] = field(default_factory=list)
    final: bool = False
    stalled: bool = False
    follows: bool = False

    def text(self) -> str:
        """For the end of the output."""
        return "\n".join(
            [f"launch: failed first: {self.who}: {self.how}", *(f"launch:   | {line}" for line in self.lines)]
        )


@dataclass(frozen=True)
class Verdict:
    """How a job ended.

    Attributes:
        code: 0, EXIT_PREEMPTED (saved on request), EXIT_EXPLAINED (starting again could not help) or 1.
        failure: the first, or None.
    """

    code: int
    failure: Failure | None = None


def first_of(failures: Sequence[Failure]) -> Failure:
    """The cause: the first that does not say of itself that it follows another."""
    return next((failure for failure in failures if not failure.follows), failures[0])


def failure_of_exit(who: str, code: int, after: str, lines: list[str], out_of_memory: bool) -> Failure:
    """What the exit of a rank means.

    Args:
        who: the rank.
        code: as `subprocess` gives it; negative for a signal.
        after: what the rank was doing.
        lines: the last that it printed.
        out_of_memory: whether the kernel of its host has ended a process for lack of memory since it started.
    """
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        if -code == signal.SIGKILL:
            how += (
                "; the kernel of that host has ended a process for lack of memory: use less of it (docs/clusters.md)"
                if out_of_memory
                else ", not for lack of memory"
            )
    return Failure(who, how + after, lines, final=code == EXIT_EXPLAINED, follows=code == EXIT_PEER)
