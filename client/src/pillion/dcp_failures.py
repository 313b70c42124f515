"""
Errors of a save or load as DCP has them: rank -> (error, stack).

Called from: `dcp`, `dcp_sessions`. An error of another process arrives as text. An error of Python's own is rebuilt from the text;
any other becomes a `RemoteError`.
"""

from __future__ import annotations

import builtins
import contextlib
import re
import traceback
from collections.abc import Mapping
from typing import Final

from torch.distributed.checkpoint.api import CheckpointException

from pillion.errors import PillionError, RemoteFailure

Wrapped = tuple[BaseException, traceback.StackSummary]

_FRAME: Final = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+), in (?P<name>.*)$')
_ERRNO: Final = re.compile(r"\[Errno (\d+)\] (.*)", re.DOTALL)
_TRACEBACK_HEAD: Final = "Traceback (most recent call last):"


class RemoteError(Exception):
    """
    An error of another process whose class cannot be rebuilt here. Its text begins with the name of that class.

    It is also the `__cause__` of a rebuilt error, with the remote traceback as its text, as in `concurrent.futures`.
    """

    def __init__(self, text: str, failure: RemoteFailure) -> None:
        self.failure = failure
        super().__init__(text)


def checkpoint_exception(
    error: BaseException, rank: int, text: str = "", others: Mapping[int, RemoteFailure] | None = None
) -> CheckpointException:
    """
    Return the error of a save or load as DCP's exception.

    Args:
        error: the error that ended the save or load.
        rank: this rank. It is named if the error names no rank.
        text: text of the exception. Empty: the error's text.
        others: failures of ranks that the error does not name.
    """
    failures: Mapping[int, RemoteFailure] = getattr(error, "failures", {})
    wrapped_failures = {failed: wrapped(failure) for failed, failure in failures.items()}
    # An error without ranks is this rank's: its sidecar is gone, or the rank could not stage.
    wrapped_failures = wrapped_failures or {rank: (error, traceback.extract_tb(error.__traceback__))}
    wrapped_failures |= {
        failed: wrapped(failure) for failed, failure in (others or {}).items() if failed not in wrapped_failures
    }
    made = CheckpointException(text or str(error), dict(sorted(wrapped_failures.items())))
    made.__cause__ = error if isinstance(error, PillionError) else None
    return made


def wrapped(failure: RemoteFailure) -> Wrapped:
    """Return a failure as DCP's WRAPPED_EXCEPTION: the error, rebuilt if it is one of Python's own, and its stack."""
    error = _rebuilt(failure)
    if failure.traceback_text:
        error.__cause__ = RemoteError(f'\n"""\n{failure.traceback_text}"""', failure)
    return error, _stack(failure.traceback_text)


def _rebuilt(failure: RemoteFailure) -> Exception:
    kind = getattr(builtins, failure.type_name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        errno = _ERRNO.fullmatch(failure.message) if issubclass(kind, OSError) else None
        with contextlib.suppress(TypeError):  # UnicodeDecodeError wants five arguments
            return kind(int(errno[1]), errno[2]) if errno else kind(failure.message)
    return RemoteError(f"{failure.type_name}: {failure.message}", failure)


def _stack(text: str) -> traceback.StackSummary:
    """The frames of the last traceback in a text: the one of the error itself, not of its causes."""
    lines = text.rpartition(_TRACEBACK_HEAD)[2].splitlines()
    frames = []
    for number, line in enumerate(lines):
        frame = _FRAME.match(line)
        if frame:
            source = lines[number + 1].strip() if lines[number + 1 : number + 2] else ""
            frames.append((frame["file"], int(frame["line"]), frame["name"], source))
    return traceback.StackSummary.from_list(frames)
