"""
The exit statuses of `pillion`, and the errors that end a command with one of them. Called from: every module of `cli`.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit status of a command. docs/reference/cli.md has the same list."""

    WELL = 0
    FOUND = 1
    """The command worked, and found something wrong: damage, a difference, or nothing of that name."""
    USAGE = 2
    UNREACHABLE = 69
    """A storage, a sidecar or a cluster does not answer, or refuses."""
    INTERNAL = 70
    INTERRUPTED = 130


class Ended(Exception):
    """A command ends here. The text is for the person who ran it: it names the thing, and what is allowed."""

    def __init__(self, status: Exit, text: str) -> None:
        super().__init__(text)
        self.status = status


def not_found(text: str) -> Ended:
    """Return the error of something that is not there."""
    return Ended(Exit.FOUND, text)


def wrong_usage(text: str) -> Ended:
    """Return the error of arguments that do not fit together."""
    return Ended(Exit.USAGE, text)
