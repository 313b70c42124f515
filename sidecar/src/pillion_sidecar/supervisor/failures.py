"""
Errors of the pod's parts as errors of a save, with the failures of the right ranks. Pure; called from: the supervisor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from pillion.errors import ErrorDocument, PillionError, RemoteFailure, SaveError, StagingError

_STORAGE_ERRORS: Final[tuple[type[OSError], ...]] = (OSError, *OSError.__subclasses__())
WHOLE: Final = frozenset(
    {each.__name__ for each in _STORAGE_ERRORS} | {"StorageHung", "PeersHung", "ExecutorDied", "CommitError"}
)
"""Kinds of failures that leave the snapshot whole in memory."""


def staging_error(step: int, errors: Mapping[int, ErrorDocument]) -> StagingError:
    """What some ranks could not stage, as one error of the step."""
    failures: dict[int, RemoteFailure] = {}
    for rank, error in errors.items():
        failures |= dict(error.failures) or {rank: RemoteFailure(error.kind, error.message)}
    return StagingError("a rank could not stage", step=step, failures=failures)


def is_hopeless(error: SaveError) -> bool:
    """Whether a save failed because a rank does not hold its snapshot, not because it could not be written."""
    return not error.failures or not all(failure.type_name in WHOLE for failure in error.failures.values())


def document(error: PillionError) -> dict[str, object]:
    """An error as it goes to a client."""
    return ErrorDocument.from_exception(error).to_document()


def for_local_ranks(error: SaveError, ranks: Iterable[int]) -> SaveError:
    """A failure of the whole executor (rank -1) is one of every local rank."""
    failure = error.failures.get(-1)
    if failure is None:
        return error
    return SaveError("the executor failed", step=error.step, failures=dict.fromkeys(ranks, failure))
