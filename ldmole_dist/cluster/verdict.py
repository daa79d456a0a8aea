"""How a job ended, and who failed first."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldmole_dist.errors import EXIT_EXPLAINED, EXIT_PEER, EXIT_PREEMPTED


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
        sudden: whether it was killed or lost, without a chance to say anything; a rank that fails on its own account because of
            that may be heard first.
        asked: whether it ended because it was asked to, before there was anything to save.
    """

    who: str
    how: str
    lines: list[str] = field(default_factory=list)
    final: bool = False
    stalled: bool = False
    follows: bool = False
    sudden: bool = False
    asked: bool = False

    def text(self) -> str:
        """For the end of the output."""
        return "\n".join([f"failed first: {self.who}: {self.how}", *(f"launch:   | {line}" for line in self.lines)])


@dataclass(frozen=True)
class Verdict:
    """How a job ended.

    Attributes:
        code: 0, EXIT_PREEMPTED (saved on request), EXIT_EXPLAINED (starting again could not help) or 1.
        failure: the first, or None.
        stopped: whether it was asked to end.
    """

    code: int
    failure: Failure | None = None
    stopped: bool = False


def first_of(failures: Sequence[Failure]) -> Failure:
    """The cause, among failures within seconds of each other: a sudden one, else one that was asked for, else one that explains
    itself, else the first that does not say of itself that it follows another."""
    return min(failures, key=lambda f: (not f.sudden, not f.asked, not f.final, f.follows))


def code_of(failure: Failure) -> int:
    """Exit code of a job that failed so."""
    return EXIT_PREEMPTED if failure.asked else EXIT_EXPLAINED if failure.final else 1


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
        names = {int(number): f" ({number.name})" for number in signal.Signals}
        how = f"was killed by signal {-code}{names.get(-code, '')}"
        if -code == signal.SIGKILL:
            how += (
                "; the kernel of that host has ended a process for lack of memory: use less of it (docs/clusters.md)"
                if out_of_memory
                else ", not for lack of memory"
            )
    final, follows, sudden = code == EXIT_EXPLAINED, code == EXIT_PEER, code == -signal.SIGKILL
    return Failure(who, how + after, lines, final=final, follows=follows, sudden=sudden)
