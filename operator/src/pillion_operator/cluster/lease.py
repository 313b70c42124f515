"""
The whole of: choosing the active one of several replicas, by a Lease.

Called from: the controller. Semantics of client-go's leaderelection: a holder's silence is measured by this process's monotonic clock from
the moment its last renewal was seen, so that no two clocks have to agree; of two writers the resource version lets one through.
Must never: stay active after `RENEW_DEADLINE_S`, which ends before another replica may take the Lease.
Source: client-go, tools/leaderelection/leaderelection.go.
"""

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

from pillion_operator import metrics
from pillion_operator.cluster import client, paths
from pillion_operator.cluster.client import Json
from pillion_operator.log import Field

LIFETIME_S: Final = 15
"""Time without a renewal after which a holder has lost the Lease, as in client-go. A killed replica is replaced within it."""
RENEW_S: Final = 5.0
"""Interval between two renewals; two of them may fail."""
RENEW_DEADLINE_S: Final = 10.0
"""Time without a renewal after which the holder gives up by itself. The 5 s until `LIFETIME_S` are for its requests in flight."""
RETRY_S: Final = 1.0
"""
Interval between two attempts of a waiting replica, and pause after a failed renewal. A released Lease is acquired within it.
"""
REQUEST_TIMEOUT_S: Final = 3.0
"""Timeout for one request about the Lease; three fit into `RENEW_DEADLINE_S`."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations of a Lease, in seconds."""

    lifetime_s: int = LIFETIME_S
    renew_s: float = RENEW_S
    deadline_s: float = RENEW_DEADLINE_S
    retry_s: float = RETRY_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The fields of a Lease's spec that matter here."""

    holder: str
    lifetime_s: float
    renewed: str
    """The time as text; it is only compared with earlier texts."""


def is_free(record: Record, *, identity: str, seen_s: float, now_s: float) -> bool:
    """
    Whether the lease may be taken.

    Args:
        record: the record of the lease.
        identity: this process's identity. An earlier process with the same identity has ended.
        seen_s: monotonic time at which exactly this record was first read.
        now_s: current monotonic time.
    """
    return record.holder in ("", identity) or now_s - seen_s > record.lifetime_s


class Lease:
    """
    One Lease, and whether this replica holds it.

    ``async with`` waits until it is held, renews it in a task, and releases it at the end. `lost` is set when it could not be
    renewed in time: then end the process.
    """

    def __init__(
        self, api: client.Client, namespace: str, name: str, identity: str, timing: Timing | None = None
    ) -> None:
        self.lost = asyncio.Event()
        self.identity = identity
        self._timing = timing or Timing()
        self._client = api
        self._collection = paths.LEASES.within(namespace)
        self._path = paths.LEASES.one(namespace, name)
        self._name = name
        self._seen: tuple[Record, float] | None = None
        self._held: Json | None = None
        """The object as this process wrote it last; None: this process does not hold the Lease."""
        self._renewed_s = 0.0
        self._renewing: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """Whether this replica is the active one, by its own clock."""
        return self._held is not None and time.monotonic() - self._renewed_s < self._timing.deadline_s

    async def __aenter__(self) -> Self:
        await self.acquire()
        self._renewing = asyncio.create_task(self.renew(), name="lease")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self.release()

    async def acquire(self) -> None:
        """Blocks: until this replica holds the lease; other replicas may hold it for days."""
        while True:
            try:
                if await self._try():
                    metrics.LEADER.set(1)
                    _log.info("acquired Lease %s", self._name, extra={Field.IDENTITY: self.identity})
                    return
            except client.Conflict:
                # Another replica was quicker.
                pass
            except (client.ApiError, client.Unreachable) as err:
                _log.warning("cannot acquire Lease %s: %s", self._name, err)
            await asyncio.sleep(self._timing.retry_s * random.uniform(0.8, 1.2))

    async def renew(self) -> None:
        """Blocks: until the lease is lost; then `lost` is set."""
        pause_s = self._timing.renew_s
        while True:
            left_s = self._renewed_s + self._timing.deadline_s - time.monotonic()
            await asyncio.sleep(max(0.0, min(pause_s, left_s)))
            pause_s = self._timing.retry_s
            try:
                if not self.held:
                    return self._lose("it could not be renewed in time")
                if not await self._try():
                    return self._lose("another replica holds it")
                pause_s = self._timing.renew_s
            except client.Conflict:
                # Another process wrote to it; the next attempt reads the holder.
                pass
            except (client.ApiError, client.Unreachable) as err:
                _log.warning("could not renew Lease %s: %s", self._name, err)

    async def release(self) -> None:
        """Give the lease up, if it is held, so that another replica need not wait for its end."""
        held, self._held = self._held, None
        metrics.LEADER.set(0)
        if held is None:
            return
        # With one second left, as client-go does it: the field must be above 0.
        held["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
        with contextlib.suppress(client.ApiError, client.Unreachable):
            # Another holder would have changed the version, and then there is nothing to give.
            await self._client.replace(self._path, held, timeout_s=REQUEST_TIMEOUT_S)
            _log.info("released Lease %s", self._name, extra={Field.IDENTITY: self.identity})

    def _lose(self, why: str) -> None:
        _log.error("lost Lease %s: %s", self._name, why, extra={Field.IDENTITY: self.identity})
        metrics.LEADER.set(0)
        self._held = None
        self.lost.set()

    async def _try(self) -> bool:
        """Try once to acquire or renew the Lease; whether this process holds it now."""
        begun_s = time.monotonic()
        try:
            current = await self._client.get(self._path, timeout_s=REQUEST_TIMEOUT_S)
        except client.NotFound:
            body: Json = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self._name},
                "spec": self._spec({}),
            }
            self._took(await self._client.create(self._collection, body, timeout_s=REQUEST_TIMEOUT_S), begun_s)
            return True
        spec = current.get("spec") or {}
        record = Record(
            holder=str(spec.get("holderIdentity") or ""),
            lifetime_s=float(spec.get("leaseDurationSeconds") or self._timing.lifetime_s),
            renewed=str(spec.get("renewTime") or ""),
        )
        if self._seen is None or self._seen[0] != record:
            self._seen = record, time.monotonic()
        if self._held is not None and record.holder != self.identity:
            return False
        if not is_free(record, identity=self.identity, seen_s=self._seen[1], now_s=time.monotonic()):
            return False
        current["spec"] = self._spec(spec)
        self._took(await self._client.replace(self._path, current, timeout_s=REQUEST_TIMEOUT_S), begun_s)
        return True

    def _spec(self, before: Json) -> Json:
        is_ours = before.get("holderIdentity") == self.identity
        transitions = int(before.get("leaseTransitions") or 0)
        now = _now()
        return before | {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._timing.lifetime_s,
            "acquireTime": before.get("acquireTime") or now if is_ours else now,
            "renewTime": now,
            "leaseTransitions": transitions if is_ours or not before else transitions + 1,
        }

    def _took(self, written: Json, begun_s: float) -> None:
        self._held = written
        # From before the request: the others count from when they see it, which is later.
        self._renewed_s = begun_s


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
