"""The one exception for bad input."""


class InputError(ValueError):
    """Input that a user can correct: names the argument or file, what it is and what it must be, in one line.

    The command line prints the message and exits with code 2.
    """
