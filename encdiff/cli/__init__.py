"""The command line: one file for each group of commands, `app` with all of them.

Nothing here loads torch before a command runs, so that `--help` answers at once. No other room imports from it.
"""
