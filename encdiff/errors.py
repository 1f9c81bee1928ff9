"""What users are told: bad input, and that a run was stopped."""


class InputError(ValueError):
    """Input that a user can correct: names the argument or file, what it is and what it must be, in one line.

    The command line prints the message and exits with code 2.
    """


class Stopped(Exception):
    """Training ended early on request; everything is saved. The command line prints the message and exits with 0."""
