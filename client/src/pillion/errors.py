"""
Every error that Pillion raises: one class for each different reaction of the caller.

Called from: the client, the sidecar and the operator. This module imports no other module of Pillion.

    PillionError
    +-- UsageError                 fix the call; never retried
    |   +-- SettingsError          names each bad setting, its value and what is allowed
    |   +-- UnsupportedLeaf        fqn, type_name, why
    +-- SidecarError               the pod's other half
    |   +-- SidecarUnavailable     not up, or gone; the save is lost, training goes on
    |   +-- ProtocolMismatch       own_version, peer_version
    |   +-- ArenaExhausted         needed_bytes, available_bytes
    +-- SaveError                  this checkpoint does not exist; .failures says which ranks and why
    |   +-- SaveSkipped            the policy's overlap dropped it (Skip, Latest)
    |   +-- StagingError           the state could not be copied into the arena
    |   +-- PersistError           the bytes could not be made durable
    |   +-- CommitError            durable everywhere, but not published
    |   +-- BarrierTimeout         phase, missing ranks, waited_s
    +-- LoadError
    |   +-- NoCheckpoint           looked_at
    |   +-- CorruptCheckpoint      path and reason of each checkpoint refused
    |   +-- IncompatibleCheckpoint the FQNs that differ
    +-- InternalError              an invariant broke; please report it

Errors cross a process boundary as text only (`RemoteFailure`), never as a pickle. A pickled exception needs the class of the
other side, and can run code (see docs/decisions/0003).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class RemoteFailure:
    """Why one rank failed, as the failing process reported it."""

    type_name: str
    """Class name of the original error, for example ``OSError``."""
    message: str
    """Text of the original error, with the errno's words if there is an errno."""
    traceback_text: str = ""
    """The remote traceback as text. Empty if there is none."""
    pid: int = 0
    """Process id of the failing process. 0 if that process is gone."""

    def to_document(self) -> dict[str, object]:
        return {"type": self.type_name, "message": self.message, "traceback": self.traceback_text, "pid": self.pid}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> RemoteFailure:
        pid = document.get("pid", 0)
        return cls(
            type_name=str(document.get("type", "Exception")),
            message=str(document.get("message", "")),
            traceback_text=str(document.get("traceback", "")),
            pid=pid if isinstance(pid, int) else 0,
        )

    @classmethod
    def from_exception(cls, error: BaseException, *, pid: int, traceback_text: str = "") -> RemoteFailure:
        return cls(type(error).__name__, str(error) or repr(error), traceback_text, pid)


class PillionError(Exception):
    """Base class of every error that Pillion raises."""


class UsageError(PillionError):
    """The call is wrong. The message says how to correct it; a retry does not help."""


class SettingsError(UsageError):
    """One or more settings are wrong. `problems` lists all of them, each with its value and what is allowed."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class UnsupportedLeaf(UsageError):
    """A value of the state dict cannot be saved, or cannot be the target of a load. `fqn` names the value, `why` the cause."""

    def __init__(self, *, fqn: str, type_name: str, why: str) -> None:
        self.fqn, self.type_name, self.why = fqn, type_name, why
        super().__init__(f"cannot save or fill {fqn!r} of type {type_name}: {why}")


class SidecarError(PillionError):
    """The sidecar did not do its part."""


class SidecarUnavailable(SidecarError):
    """The sidecar is not up, or went away. Training continues. Saves fail until the sidecar is back."""


class ProtocolMismatch(SidecarError):
    """
    Client and sidecar speak different versions of the control protocol.

    `own_version` is this process's, `peer_version` that of the process on the other side.
    """

    def __init__(self, *, own_version: int, peer_version: int) -> None:
        self.own_version, self.peer_version = own_version, peer_version
        super().__init__(
            f"protocol version {own_version} here, {peer_version} on the other side of the control socket: install the same release"
            " of pillion and pillion-sidecar"
        )


class ArenaExhausted(SidecarError):
    """The arena has no room for the snapshot and cannot grow: the policy's limit is reached, or the arena's file system is full."""

    def __init__(
        self, *, needed_bytes: int, available_bytes: int, cause: str = "", remedy: str = "raise staging.sizeLimit"
    ) -> None:
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes
        self.cause, self.remedy = cause, remedy
        super().__init__(
            f"the arena has {available_bytes} bytes for a snapshot that needs {needed_bytes}"
            f"{': ' + cause if cause else ''}; {remedy}"
        )


SHOWN_RANKS: Final = 16
"""Maximum ranks that a text names. A job of thousands would otherwise write a hundred kilobytes into each of its logs."""
SHOWN_CAUSES: Final = 8
"""Maximum causes that the text of a failed save names. `SaveError.failures` has all."""


def named(ranks: Sequence[int]) -> str:
    """Return ranks for a text: the first SHOWN_RANKS, and how many more there are."""
    more = len(ranks) - SHOWN_RANKS
    return f"{list(ranks[:SHOWN_RANKS])}" + (f" and {more:,} more" if more > 0 else "")


def _causes(failures: Mapping[int, RemoteFailure]) -> str:
    """Return the causes of a failed save for its text. Ranks with one cause are named together. Empty if there are none."""
    ranks: dict[str, list[int]] = {}
    for rank, failure in sorted(failures.items()):
        ranks.setdefault(f"{failure.type_name}: {failure.message}", []).append(rank)
    shown = [
        f"rank {of_cause[0]}: {cause}" if len(of_cause) == 1 else f"ranks {named(of_cause)}: {cause}"
        for cause, of_cause in list(ranks.items())[:SHOWN_CAUSES]
    ]
    more = len(ranks) - SHOWN_CAUSES
    if more > 0:
        shown.append(f"and {more:,} more causes")
    return f" [{'; '.join(shown)}]" if shown else ""


class SaveError(PillionError):
    """
    The save failed. Its checkpoint does not exist; the previous checkpoint is untouched.

    `failures` maps each failed rank to its cause. Ranks without a failure are not in it.
    """

    def __init__(self, message: str, *, step: int = -1, failures: Mapping[int, RemoteFailure] | None = None) -> None:
        self.step = step
        self.failures: Mapping[int, RemoteFailure] = dict(failures or {})
        super().__init__(message + _causes(self.failures))


class SaveSkipped(SaveError):
    """No slot was free, and the policy's ``overlap`` (Skip or Latest) dropped this save."""


class StagingError(SaveError):
    """The state could not be copied into the arena."""


class PersistError(SaveError):
    """A rank could not make its bytes durable."""


class CommitError(SaveError):
    """All bytes are durable, but the checkpoint was not committed."""


class BarrierTimeout(SaveError):
    """Some ranks did not arrive at a phase within its timeout. `missing` names the ranks, `waited_s` the timeout in seconds."""

    def __init__(
        self,
        *,
        phase: str,
        missing: Sequence[int],
        waited_s: float,
        step: int = -1,
        failures: Mapping[int, RemoteFailure] | None = None,
    ) -> None:
        self.phase, self.missing, self.waited_s = phase, tuple(missing), waited_s
        super().__init__(
            f"ranks {named(self.missing)} did not arrive at {phase!r} within {waited_s:.1f} s",
            step=step,
            failures=failures,
        )


class LoadError(PillionError):
    """The load failed. Unlike a save, a load raises: training with wrong weights is worse than an error."""


class NoCheckpoint(LoadError):
    """There is no checkpoint, and the policy or the call demands one."""


class CorruptCheckpoint(LoadError):
    """Checkpoints exist, but none can be read. `reasons` maps each to its cause. A load never starts fresh instead."""

    def __init__(self, message: str, *, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons: Mapping[str, str] = dict(reasons or {})
        super().__init__(message)


class IncompatibleCheckpoint(LoadError):
    """The checkpoint does not fit the state dict. `fqns` names the differing values."""

    def __init__(self, message: str, *, fqns: Sequence[str] = ()) -> None:
        self.fqns = tuple(fqns)
        super().__init__(message)


class InternalError(PillionError):
    """Pillion has a defect: an invariant does not hold. Please report it with the log."""


_RANK = re.compile("-1|[0-9]{1,9}")
"""A rank as a JSON key; -1 is the whole executor. Other keys are ignored."""


@dataclass(frozen=True, slots=True)
class ErrorDocument:
    """A `PillionError` on the wire: class name, text, and the failures of the ranks."""

    kind: str
    message: str
    failures: Mapping[int, RemoteFailure] = field(default_factory=dict)
    detail: Mapping[str, object] = field(default_factory=dict)
    """Fields of the error that are sent with it: ``missing``, ``phase``, ``fqns``, ``reasons``, ..."""

    def to_document(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "message": self.message,
            "failures": {str(rank): failure.to_document() for rank, failure in self.failures.items()},
            "detail": dict(self.detail),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> ErrorDocument:
        failures = document.get("failures")
        detail = document.get("detail")
        return cls(
            kind=str(document.get("kind", "InternalError")),
            message=str(document.get("message", "")),
            failures={
                int(rank): RemoteFailure.from_document(failure)
                for rank, failure in (failures.items() if isinstance(failures, Mapping) else ())
                if isinstance(failure, Mapping) and _RANK.fullmatch(str(rank))
            },
            detail=dict(detail) if isinstance(detail, Mapping) else {},
        )

    @classmethod
    def from_exception(cls, error: PillionError) -> ErrorDocument:
        detail: dict[str, object] = {}
        for name in (
            "phase",
            "missing",
            "waited_s",
            "needed_bytes",
            "available_bytes",
            "cause",
            "remedy",
            "fqns",
            "reasons",
            "problems",
            "own_version",
            "peer_version",
        ):
            if hasattr(error, name):
                value = getattr(error, name)
                detail[name] = list(value) if isinstance(value, tuple) else value
        # The failures travel as a field. The receiver appends them to the text again, so they are cut off here.
        message = str(error)
        failures = getattr(error, "failures", {})
        if failures:
            message = message.rsplit(" [rank", 1)[0]
        return cls(type(error).__name__, message, failures, detail)

    def to_exception(self, *, step: int = -1) -> PillionError:
        """Rebuild the error in this process. An unknown kind becomes a SaveError, as newer sidecars may have more kinds."""
        detail = self.detail

        def number(name: str) -> int:
            value = detail.get(name, 0)
            return value if isinstance(value, int) else 0

        def sequence(name: str) -> list[object]:
            value = detail.get(name, ())
            return list(value) if isinstance(value, (list, tuple)) else []

        if self.kind == "BarrierTimeout":
            waited = detail.get("waited_s", 0.0)
            return BarrierTimeout(
                phase=str(detail.get("phase", "")),
                missing=[rank for rank in sequence("missing") if isinstance(rank, int)],
                waited_s=float(waited) if isinstance(waited, (int, float)) else 0.0,
                step=step,
                failures=self.failures,
            )
        if self.kind == "ProtocolMismatch":
            # The other side raised this error, so its own version is the peer's here.
            return ProtocolMismatch(own_version=number("peer_version"), peer_version=number("own_version"))
        if self.kind == "ArenaExhausted":
            texts = {name: str(detail[name]) for name in ("cause", "remedy") if name in detail}
            return ArenaExhausted(
                needed_bytes=number("needed_bytes"), available_bytes=number("available_bytes"), **texts
            )
        if self.kind == "SettingsError":
            return SettingsError([str(problem) for problem in sequence("problems")] or [self.message])
        if self.kind == "IncompatibleCheckpoint":
            return IncompatibleCheckpoint(self.message, fqns=[str(fqn) for fqn in sequence("fqns")])
        if self.kind == "CorruptCheckpoint":
            reasons = detail.get("reasons")
            return CorruptCheckpoint(
                self.message,
                reasons={str(k): str(v) for k, v in reasons.items()} if isinstance(reasons, Mapping) else {},
            )
        save_errors = {c.__name__: c for c in (SaveSkipped, StagingError, PersistError, CommitError, SaveError)}
        plain = {
            c.__name__: c
            for c in (UsageError, SidecarError, SidecarUnavailable, LoadError, NoCheckpoint, InternalError)
        }
        if self.kind in plain:
            return plain[self.kind](self.message)
        return save_errors.get(self.kind, SaveError)(self.message, step=step, failures=self.failures)
