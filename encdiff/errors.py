"""What users are told: bad input, and that a run was stopped."""

import re


class InputError(ValueError):
    """Input that a user can correct: names the argument or file, what it is and what it must be, in one line.

    The command line prints the message and exits with code 2. Names and values out of files may hold anything: line
    breaks become blanks, and characters that do not print are escaped.
    """

    def __init__(self, message: str):
        line = re.sub(r"\s*[\n\r]+\s*", " ", message)
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


class Told(InputError):
    """Bad input of which all of several processes know; the first one tells the user."""


class Lost(Exception):
    """Another of several processes ended, or did not answer in time; the last checkpoint is whole."""


class Stopped(Exception):
    """Training ended early on request; everything is saved. The command line prints the message and exits with 0."""
