"""Errors that a user can act on: one line that names the value and the remedy, no traceback."""


class UserError(Exception):
    """Something the user can put right: a config, a file, a combination of options."""


class PeerError(Exception):
    """Another rank failed; its own message says why."""


class Preempted(Exception):
    """The run was asked to end, has saved a checkpoint and can go on."""


class NonFiniteLoss(Exception):
    """The loss stopped being a number; training cannot go on."""


EXIT_EXPLAINED = 2  # a message says what the user can put right; starting again would only fail again
EXIT_PEER = 3  # another rank failed, and says why
EXIT_PREEMPTED = 75  # saved on request, goes on when started again: EX_TEMPFAIL of sysexits.h
