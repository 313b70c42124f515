"""
Converts the failures of a save (rank -> `RemoteFailure`) to documents of the exchange and back.

Called from: `executor.save.persist`, `executor.save.dcp_writer`. Every pod ends a save with the same failures. Ranks without a failure are not in
them.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from typing import Any

from pillion.errors import BarrierTimeout, CommitError, PersistError, RemoteFailure, SaveSkipped


def of_exception(err: BaseException) -> RemoteFailure:
    text = "".join(traceback.format_exception(err))
    return RemoteFailure.from_exception(err, pid=os.getpid(), traceback_text=text)


def documents(failures: Mapping[int, RemoteFailure]) -> dict[str, Any]:
    return {str(rank): failure.to_document() for rank, failure in failures.items()}


def of_missing(err: BarrierTimeout) -> dict[int, RemoteFailure]:
    """Return a failure for each rank that did not arrive."""
    text = f"did not arrive at {err.phase!r} within {err.waited_s:.1f} s"
    return {rank: RemoteFailure("BarrierTimeout", text) for rank in err.missing}


def collect(documents: Mapping[int, Mapping[str, Any]]) -> dict[int, RemoteFailure]:
    """Return the failures in the documents of all pods."""
    return {
        int(rank): RemoteFailure.from_document(failure)
        for document in documents.values()
        for rank, failure in document.get("failures", {}).items()
    }


def raise_told(decision: Mapping[str, Any], step: int) -> None:
    """
    Raise the failure of the save that the coordinator's decision contains. Return if it contains none.

    Raises:
        SaveSkipped: another pod has dropped the save, by the policy's `overlap`.
        SaveError: the save failed. Has the failures of every failed rank.
    """
    failures = collect({0: decision})
    if not failures:
        return
    if all(failure.type_name == SaveSkipped.__name__ for failure in failures.values()):
        raise SaveSkipped(f"step {step} was dropped in another pod", step=step, failures=failures)
    if "phase" in decision:
        raise BarrierTimeout(
            phase=str(decision["phase"]),
            missing=sorted(failures),
            waited_s=float(decision.get("waited_s", 0.0)),
            step=step,
            failures=failures,
        )
    kind = CommitError if decision.get("kind") == "CommitError" else PersistError
    raise kind(f"step {step} was not saved", step=step, failures=failures)
