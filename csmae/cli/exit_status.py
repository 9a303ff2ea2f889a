"""Exit statuses of the program."""

FAILED = 1
"""The command ran and found something wrong, or did not reach its end."""

BAD_INPUT = 2
"""A mistake in the command line, in a file that it names, or in what it refers to; one line on standard error says which."""

INTERRUPTED = 130
"""Ctrl-C, as shells count it."""
