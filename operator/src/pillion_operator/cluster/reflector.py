"""
The whole of: a cache of one collection: list, watch, and list again when the watch cannot continue.

Called from: the event loop; `run` is one task of the process. Keeps of each object only what `project` makes of it.
Must never: end by itself, call the API server in a tight loop, or drop its objects because the API server is down.
Source: Kubernetes documentation, "Efficient detection of changes".
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeVar

from pillion_operator import metrics
from pillion_operator.cluster import client
from pillion_operator.cluster.client import Json
from pillion_operator.log import Field

T = TypeVar("T")
Key = tuple[str, str]
"""Namespace and name; the namespace is empty for kinds that have none."""

WATCH_S: Final = 300.0
"""Time after which the server ends a stream, so that a client that only seems connected costs the server no more than this."""
IDLE_S: Final = 90.0
"""Maximum silence of a stream. Bookmarks come every minute, so a longer silence means a dead connection."""
BACKOFF_FIRST_S: Final = 0.2
MAX_BACKOFF_S: Final = 15.0
"""
Maximum pause between two attempts. client-go waits up to 30 s, but a policy that was just created should not wait that long.
"""
SHORT_S: Final = 1.0
"""Minimum life of a stream without events. The next stream after a shorter one has to wait."""
STALE_S: Final = 3 * IDLE_S
"""Time without any event after which a cache is considered stale; see `Reflector.age_s`."""

_log = logging.getLogger(__name__)


class Reflector(Generic[T]):
    """
    The cached objects of one collection, as current as the API server's answers.

    `synced` is set with the first whole list and never cleared: what was known is better than nothing.
    """

    def __init__(
        self,
        api: client.Client,
        path: str,
        project: Callable[[Json], T | None],
        *,
        label_selector: str = "",
        field_selector: str = "",
        metadata_only: bool = False,
        on_change: Callable[[Key, T | None, T | None], None] | None = None,
        watch_s: float = WATCH_S,
        idle_s: float = IDLE_S,
    ) -> None:
        """
        Args:
            api: access to the API server.
            path: of the collection.
            project: what is kept of an object; None: nothing, as if it were not there.
            label_selector: of the wanted objects.
            field_selector: likewise.
            metadata_only: whether the objects come without spec and status.
            on_change: called in the loop with the key, what was kept, and what is kept now; None stands for nothing.
            watch_s: see `WATCH_S`.
            idle_s: see `IDLE_S`.
        """
        self.synced = asyncio.Event()
        self.last_event_s = time.monotonic()
        """When the API server last gave a sign of life: a page, an event, a bookmark, the end of a stream; monotonic."""
        self._client = api
        self._path = path
        self._resource = path.rsplit("/", 1)[-1]
        self._project = project
        self._selection: dict[str, str | bool] = {
            "label_selector": label_selector,
            "field_selector": field_selector,
            "metadata_only": metadata_only,
        }
        self._on_change = on_change
        self._watch_s = watch_s
        self._idle_s = idle_s
        self._kept: dict[Key, T] = {}
        self._failures = 0

    def get(self, namespace: str, name: str) -> T | None:
        """The kept part of an object, or None."""
        return self._kept.get((namespace, name))

    def values(self) -> Iterable[T]:
        """All that is kept, in no order; not to be held across an await."""
        return self._kept.values()

    def __len__(self) -> int:
        return len(self._kept)

    def age_s(self) -> float:
        """Seconds since the last sign of life; above `STALE_S` something is wrong with the API server or with us."""
        return time.monotonic() - self.last_event_s

    async def run(self) -> None:
        """Keep the cache. Blocks: until it is cancelled."""
        version = ""
        while True:
            try:
                if not version:
                    version = await self._list()
                version = await self._watch(version)
                continue
            except client.Gone:
                self._restarting("gone", "its resource version is too old")
                version = ""
            except client.ApiError as err:
                # Which version was wrong, or not allowed, is not known: begin again.
                self._restarting("refused", str(err))
                version = ""
            except client.Unreachable as err:
                self._restarting("unreachable", str(err))
            await asyncio.sleep(self._backoff_s())

    async def _list(self) -> str:
        seen: set[Key] = set()
        version = ""
        async for page in self._client.pages(self._path, **self._selection):  # type: ignore[arg-type]  # see __init__
            self.last_event_s = time.monotonic()
            for document in page.get("items") or []:
                seen.add(self._take(document))
            version = str((page.get("metadata") or {}).get("resourceVersion") or "")
            # A long list is not to hold up what else the loop does.
            await asyncio.sleep(0)
        for key in [key for key in self._kept if key not in seen]:
            self._keep(key, None)
        self.synced.set()
        return version

    async def _watch(self, version: str) -> str:
        """Follow one stream to its end; the version to go on from."""
        begun = last = time.monotonic()
        # Spread, so that the watches of many replicas do not all restart at one moment.
        watch_s = self._watch_s * random.uniform(0.8, 1.2)
        stream = self._client.watch(
            self._path,
            resource_version=version,
            timeout_s=watch_s,
            idle_s=self._idle_s,
            **self._selection,  # type: ignore[arg-type]  # see __init__
        )
        num_events = 0
        async with contextlib.aclosing(stream):
            async for event in stream:
                num_events += 1
                self._failures = 0
                last = self.last_event_s = time.monotonic()
                version = str((event.object.get("metadata") or {}).get("resourceVersion") or version)
                if event.kind == "DELETED":
                    self._keep(_key(event.object), None)
                elif event.kind != "BOOKMARK":
                    self._take(event.object)
        # A stream that was opened is a sign of life too, and here it was.
        self.last_event_s = time.monotonic()
        is_idle = self.last_event_s - last >= self._idle_s
        metrics.WATCH_RESTARTS.labels(self._resource, "idle" if is_idle else "ended").inc()
        if not num_events and self.last_event_s - begun < SHORT_S:
            # A server that ends every stream at once is as good as one that is away.
            await asyncio.sleep(self._backoff_s())
        else:
            self._failures = 0
        return version

    def _take(self, document: Json) -> Key:
        key = _key(document)
        try:
            kept = self._project(document)
        except Exception:
            # The boundary of the process: one object that we cannot read must not cost us all the others.
            metrics.WATCH_UNREADABLE.labels(self._resource).inc()
            _log.exception(
                "cannot read %s %s/%s; ignoring the object", self._resource, *key, extra={Field.PATH: self._path}
            )
            kept = None
        self._keep(key, kept)
        return key

    def _keep(self, key: Key, new: T | None) -> None:
        old = self._kept.pop(key, None)
        if new is not None:
            self._kept[key] = new
        if self._on_change is None or (old is None and new is None):
            return
        try:
            self._on_change(key, old, new)
        except Exception:
            # As in _take: the cache goes on.
            metrics.WATCH_UNREADABLE.labels(self._resource).inc()
            _log.exception("handling a change of %s %s/%s failed", self._resource, *key, extra={Field.PATH: self._path})

    def _restarting(self, why: str, text: str) -> None:
        metrics.WATCH_RESTARTS.labels(self._resource, why).inc()
        level = logging.WARNING if why != "gone" else logging.INFO
        _log.log(level, "restarting the watch of %s: %s", self._resource, text, extra={Field.PATH: self._path})

    def _backoff_s(self) -> float:
        bound: float = min(BACKOFF_FIRST_S * 2**self._failures, MAX_BACKOFF_S)
        self._failures = min(self._failures + 1, 16)
        return bound * random.uniform(0.5, 1.0)


def _key(document: Json) -> Key:
    metadata = document.get("metadata") or {}
    return str(metadata.get("namespace") or ""), str(metadata.get("name") or "")
