"""Errors of the package, and the exit codes of the command line."""

from __future__ import annotations

import importlib.util


class UserError(Exception):
    """Error that the user can resolve, such as a wrong value in a config or a damaged file.

    The message names the value and the remedy. The command line prints it without a traceback.
    """


class PeerError(Exception):
    """Another rank has failed. That rank prints the original error."""


class Preempted(Exception):
    """A run has stopped after a stop request (SIGTERM or SIGINT) and saved a checkpoint to resume from."""


class NonFiniteLoss(Exception):
    """The loss or a gradient became NaN or infinite, so training cannot continue."""


EXIT_EXPLAINED = 2  # a UserError or NonFiniteLoss, or problems that a check found; the same command would fail again
EXIT_PEER = 3  # another rank failed
EXIT_PREEMPTED = 75  # stopped after saving a checkpoint, can be resumed; EX_TEMPFAIL of sysexits.h


def require_extra(extra: str, *modules: str) -> None:
    """Raise UserError unless the packages of an optional extra are installed.

    Args:
        extra: name in the package's `extras_require`, such as "report".
        modules: top-level modules that the extra installs.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"missing packages: {', '.join(missing)}; run: pip install 'ldmole-dist[{extra}]'")
