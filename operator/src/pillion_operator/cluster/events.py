"""
The whole of: Events on objects, for `kubectl describe`: a repeated message is one Event with a count.

Called from: webhook and controller, with `post`, which never waits and never fails; `run` is one task of the process.
Must never: hold up an admission, grow without a bound, or write to the object that an Event is about.
"""

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from pillion_operator import metrics
from pillion_operator.cluster import client, paths
from pillion_operator.cluster.client import Json
from pillion_operator.log import Field

MAX_QUEUE: Final = 256
"""Maximum number of Events that wait to be written. Further Events are dropped and counted."""
RATE: Final = 10.0
"""Average writes a second. Events are for people, and must not load the API server."""
BURST: Final = 50.0
"""Maximum number of writes at once."""
SAME_S: Final = 600.0
"""Time for which a repeated message is counted on its existing Event."""
QUIET_S: Final = 20.0
"""Minimum time between two writes of one Event's count."""
SWEEP_S: Final = 5.0
"""Interval between two looks for counts that are not written yet."""
MAX_REMEMBERED: Final = 1024
"""Maximum number of Events whose repetitions are counted."""
FLUSH_S: Final = 3.0
"""Timeout for writing the queued Events at the end of the process."""
CONTROLLER: Final = "pillion.dev/operator"
_MAX_MESSAGE: Final = 1024
"""Maximum characters of a message; the API server refuses a longer note."""
_MAX_NAME: Final = 200

_log = logging.getLogger(__name__)
Key = tuple[str, str, str, str, str, str]


@dataclass(slots=True)
class _Posted:
    """An Event that was queued."""

    name: str
    begun_s: float
    count: int = 1
    written_s: float = 0.0
    """When it was last queued to be written; monotonic."""
    written_count: int = 0
    """The count that was written, or is going to be."""
    exists: bool = False


@dataclass(frozen=True, slots=True)
class _Write:
    """An entry of the queue. All fields but the key are for an Event that does not exist yet."""

    key: Key
    about: Json
    kind: str
    action: str


class Events:
    """A bounded queue of Events, and the one task that writes them."""

    def __init__(self, api: client.Client, instance: str) -> None:
        """
        Args:
            api: access to the API server.
            instance: which replica reports.
        """
        self._client = api
        self._instance = instance[:128]
        self._queue: asyncio.Queue[_Write] = asyncio.Queue(MAX_QUEUE)
        self._posted: OrderedDict[Key, _Posted] = OrderedDict()
        self._tokens = BURST
        self._filled_s = time.monotonic()

    def post(self, about: Json, reason: str, message: str, *, warning: bool = False, action: str = "Inject") -> None:
        """
        Queue an Event about an object. Never blocks, never raises.

        Args:
            about: `apiVersion`, `kind`, `namespace`, `name` and `uid` of the object.
            reason: a code in CamelCase.
            message: for a person.
            warning: whether something is wrong.
            action: the action behind it, a code in CamelCase.
        """
        now_s = time.monotonic()
        message = message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 3] + "..."
        namespace, uid = str(about.get("namespace") or ""), str(about.get("uid") or "")
        key = (namespace, str(about.get("kind")), str(about.get("name")), uid, reason, message)
        record = self._posted.get(key)
        if record is None or now_s - record.begun_s > SAME_S:
            name = f"{str(about.get('name'))[:_MAX_NAME].rstrip('-.')}.{uuid.uuid4().hex[:16]}"
            record = self._posted[key] = _Posted(name, now_s)
            while len(self._posted) > MAX_REMEMBERED:
                self._posted.popitem(last=False)
        else:
            record.count += 1
            if now_s - record.written_s < QUIET_S:
                return
        self._posted.move_to_end(key)
        self._enqueue(_Write(key, about, "Warning" if warning else "Normal", action), record)

    def _enqueue(self, write: _Write, record: _Posted) -> None:
        record.written_s, record.written_count = time.monotonic(), record.count
        try:
            self._queue.put_nowait(write)
        except asyncio.QueueFull:
            metrics.EVENTS_DROPPED.labels("queue").inc()
            # The next message of its kind is to be tried again.
            del self._posted[write.key]

    async def run(self) -> None:
        """Write what is posted. Blocks: until it is cancelled."""
        sweeping = asyncio.create_task(self._sweep(), name="event counts")
        try:
            while True:
                write = await self._queue.get()
                try:
                    await self._pace()
                    await self._write(write)
                finally:
                    self._queue.task_done()
        finally:
            sweeping.cancel()

    async def _sweep(self) -> None:
        """Write the last count of messages that were repeated and then stopped."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = time.monotonic()
            for key, record in list(self._posted.items()):
                if record.exists and record.count > record.written_count and now_s - record.written_s >= QUIET_S:
                    self._enqueue(_Write(key, {}, "", ""), record)

    async def flush(self) -> None:
        """Blocks: until all that was posted is written, while `run` runs; `FLUSH_S` at most."""
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._queue.join()
        except TimeoutError:
            metrics.EVENTS_DROPPED.labels("queue").inc(self._queue.qsize())

    async def _pace(self) -> None:
        now_s = time.monotonic()
        self._tokens = min(BURST, self._tokens + (now_s - self._filled_s) * RATE)
        self._filled_s = now_s
        if self._tokens < 1:
            await asyncio.sleep((1 - self._tokens) / RATE)
        self._tokens -= 1

    async def _write(self, write: _Write) -> None:
        record = self._posted.get(write.key)
        if record is None:
            return
        # An Event lies in the namespace of what it is about; that of an object without one, in `default`.
        collection = paths.EVENTS.within(write.key[0] or "default")
        try:
            if record.exists:
                series = {"count": record.count, "lastObservedTime": _now()}
                await self._client.patch(f"{collection}/{record.name}", {"series": series})
            else:
                await self._client.create(collection, self._event(write, record))
                record.exists = True
            metrics.EVENTS_POSTED.inc()
        except (client.ApiError, client.Unreachable) as err:
            metrics.EVENTS_DROPPED.labels("refused").inc()
            self._posted.pop(write.key, None)
            _log.warning("could not write an Event: %s", err, extra={Field.REASON: write.key[4]})

    def _event(self, write: _Write, record: _Posted) -> Json:
        namespace, _, _, _, reason, message = write.key
        fields = ("apiVersion", "kind", "namespace", "name", "uid")
        event: Json = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": record.name, "namespace": namespace or "default"},
            "eventTime": _now(),
            "regarding": {name: write.about[name] for name in fields if write.about.get(name)},
            "reason": reason,
            "note": message,
            "type": write.kind,
            "action": write.action,
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance,
        }
        if record.count > 1:
            event["series"] = {"count": record.count, "lastObservedTime": _now()}
        return event


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
