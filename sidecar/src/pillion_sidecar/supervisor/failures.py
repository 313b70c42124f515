"""
Turns the errors of a pod's processes into errors of a save that name the right ranks. Pure.

Called from: `supervisor.staging`, `supervisor.persister`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from pillion.errors import ErrorDocument, PillionError, RemoteFailure, SaveError, StagingError

_STORAGE_ERRORS: Final[tuple[type[OSError], ...]] = (OSError, *OSError.__subclasses__())
WHOLE: Final = frozenset(
    {each.__name__ for each in _STORAGE_ERRORS} | {"StorageHung", "PeersHung", "ExecutorDied", "CommitError"}
)
"""Kinds of failures that leave the snapshot whole in memory."""
NAMES_SHOWN: Final = 20
"""Maximum names in a warning. The checkpoint's manifest has more."""


def staging_error(step: int, errors: Mapping[int, ErrorDocument]) -> StagingError:
    """Return one error for a step that some ranks could not stage. `errors`: rank -> its error."""
    failures: dict[int, RemoteFailure] = {}
    for rank, error in errors.items():
        failures |= dict(error.failures) or {rank: RemoteFailure(error.kind, error.message)}
    return StagingError("a rank could not stage", step=step, failures=failures)


def is_hopeless(error: SaveError) -> bool:
    """Whether a rank lacks its snapshot, so that no later attempt can write the save. False: only the writing failed."""
    return not error.failures or not all(failure.type_name in WHOLE for failure in error.failures.values())


def document(error: PillionError) -> dict[str, object]:
    """Return an error as a document for a client."""
    return ErrorDocument.from_exception(error).to_document()


def differing_text(differing: Sequence[str]) -> str:
    """Return the warning about names whose values differ from rank to rank, of which storage keeps one rank's."""
    more = f" and {len(differing) - NAMES_SHOWN} more" if len(differing) > NAMES_SHOWN else ""
    return (
        f"each rank has its own value of {', '.join(differing[:NAMES_SHOWN])}{more}: storage keeps the lowest rank's, and a load from"
        " there gives it to all ranks. Give each rank's value a key of its own"
    )


def for_local_ranks(error: SaveError, ranks: Iterable[int]) -> SaveError:
    """Return a failure of the whole executor (rank -1) as a failure of every local rank. Other errors are returned unchanged."""
    failure = error.failures.get(-1)
    if failure is None:
        return error
    return SaveError("the executor failed", step=error.step, failures=dict.fromkeys(ranks, failure))
