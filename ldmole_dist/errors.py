"""Errors that a user can act on: one line that names the value and the remedy, no traceback."""


class UserError(Exception):
    """Something the user can put right: a config, a file, a combination of options."""


class PeerError(Exception):
    """Another rank failed; its own message says why."""


class Preempted(Exception):
    """The run was asked to end, has saved a checkpoint and can go on."""


class NonFiniteLoss(Exception):
    """The loss stopped being a number; training cannot go on."""
