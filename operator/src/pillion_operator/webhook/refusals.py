"""
The whole of: Events about pods that are refused or start without a sidecar: on their owner, once the API server confirms that it exists.

Called from: `server`, with `post`, which never waits and never fails; `run` is one task of the process.
Must never: write an Event for an unverified review: every client that reaches the port can send one, and the Event would be in any namespace,
in the operator's name. Only accounts that may read an owner know its UID.
"""

import asyncio
import logging
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from pillion_operator import metrics
from pillion_operator.cluster import client, events, paths
from pillion_operator.cluster.client import Json
from pillion_operator.log import Field

OWNERS: Final = {
    (resource.version, kind): resource
    for kind, resource in (
        ("Job", paths.JOBS),
        ("ReplicaSet", paths.REPLICA_SETS),
        ("StatefulSet", paths.STATEFUL_SETS),
        ("PyTorchJob", paths.PYTORCH_JOBS),
        ("RayCluster", paths.RAY_CLUSTERS),
        ("Job", paths.VOLCANO_JOBS),
        ("Workflow", paths.ARGO_WORKFLOWS),
    )
}
"""
Owners that can be looked up; each is a right of the webhook's account. A pod of another owner is refused without an Event: the
API server gives the owner the same text, and most owners make an Event of it.
"""
MAX_WAITING: Final = 256
"""Maximum number of refusals that wait for the lookup of their owner. Further ones are dropped and counted."""
LOOKS_PER_S: Final = 10.0
"""Maximum lookups of owners a second. A refused job retries forever, and its owner is looked up once in `KNOWN_S`."""
KNOWN_S: Final = 60.0
"""Time for which an answer about an owner is valid."""
MAX_KNOWN: Final = 1024
"""Maximum number of remembered answers."""
LOOKUP_S: Final = 2.0
"""Timeout for one lookup."""
# A DNS subdomain, which cannot leave its place in a path.
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,251}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_MAX_NAME: Final = 253

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Refusal:
    about: Json
    reason: str
    message: str


class Refusals:
    """A bounded queue of refusals, and the one task that looks up their owners."""

    def __init__(self, api: client.Client, posted: events.Events) -> None:
        self._client = api
        self._events = posted
        self._waiting: asyncio.Queue[_Refusal] = asyncio.Queue(MAX_WAITING)
        self._owners: OrderedDict[tuple[str, str], tuple[float, bool]] = OrderedDict()
        """By path and UID: until when it holds, and whether there is such an owner."""

    def post(self, about: Json, reason: str, message: str) -> None:
        """
        Queue an Event about a pod, for the pod's owner. Never blocks, never raises.

        Args:
            about: `apiVersion`, `kind`, `namespace`, `name` and `uid` of the owner, from the review.
            reason: a code in CamelCase.
            message: for a person.
        """
        if path_of(about) is None:
            return
        try:
            self._waiting.put_nowait(_Refusal(about, reason, message))
        except asyncio.QueueFull:
            metrics.EVENTS_DROPPED.labels("queue").inc()

    async def run(self) -> None:
        """Look up owners, and post Events. Blocks: until it is cancelled."""
        while True:
            refusal = await self._waiting.get()
            try:
                if await self._exists(refusal.about):
                    self._events.post(refusal.about, refusal.reason, refusal.message, warning=True)
                else:
                    metrics.EVENTS_DROPPED.labels("unverified").inc()
            except (client.ApiError, client.Unreachable) as err:
                metrics.EVENTS_DROPPED.labels("unverified").inc()
                _log.debug("could not look up the owner of a refused pod: %s", err)
            finally:
                self._waiting.task_done()

    async def flush(self) -> None:
        """Blocks: until all that was posted was looked at, while `run` runs; `events.FLUSH_S` at most."""
        try:
            async with asyncio.timeout(events.FLUSH_S):
                await self._waiting.join()
        except TimeoutError:
            metrics.EVENTS_DROPPED.labels("queue").inc(self._waiting.qsize())

    async def _exists(self, about: Json) -> bool:
        path, uid = path_of(about), str(about["uid"])
        if path is None:
            return False
        now_s = time.monotonic()
        until_s, exists = self._owners.get((path, uid), (0.0, False))
        if now_s < until_s:
            return exists
        await asyncio.sleep(1 / LOOKS_PER_S)
        try:
            document = await self._client.get(path, metadata_only=True, timeout_s=LOOKUP_S)
            exists = (document.get("metadata") or {}).get("uid") == uid
        except client.NotFound:
            exists = False
        self._owners[path, uid] = now_s + KNOWN_S, exists
        self._owners.move_to_end((path, uid))
        while len(self._owners) > MAX_KNOWN:
            self._owners.popitem(last=False)
        if not exists:
            _log.debug("the owner that a review names does not exist", extra={Field.NAMESPACE: about.get("namespace")})
        return exists


def path_of(about: Json) -> str | None:
    """Path of an owner in the API; None if its kind cannot be looked up."""
    resource = OWNERS.get((str(about.get("apiVersion")), str(about.get("kind"))))
    name, namespace = about.get("name"), about.get("namespace")
    if resource is None or not about.get("uid") or not (_is_name(name) and _is_name(namespace)):
        return None
    return resource.one(str(namespace), str(name))


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and len(text) <= _MAX_NAME and _NAME.fullmatch(text) is not None
