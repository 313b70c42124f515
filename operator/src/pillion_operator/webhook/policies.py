"""
The whole of: the CheckpointPolicy that a pod names: from the cache, or, where it is not there, from the API server.

Called from: `server`, for each pod. A new policy may not be in the cache yet, and a pod of its job must not be
refused for that: so a miss is looked up, once for all concurrent callers.
Must never: look up what is in the cache; take longer than `LOOKUP_S`; look up more because somebody invents names.
"""

import asyncio
import time
from collections import OrderedDict
from typing import Final

from pillion_operator import metrics
from pillion_operator.cluster import client, paths, reflector
from pillion_operator.injection import checkpoint_policy
from pillion_operator.injection.checkpoint_policy import CheckpointPolicy

LOOKUP_S: Final = 2.0
"""Timeout for one lookup: less than half of the time that the API server gives the webhook."""
MISSING_S: Final = 1.0
"""Time for which a policy is remembered as missing: a job with a wrong name creates pods by the hundred."""
MAX_MISSING: Final = 1024
"""Maximum number of missing policies that are remembered."""
ASKED_AT_ONCE: Final = 16
"""Maximum number of lookups at one time. A policy in the cache needs none, and all pods of one policy share one."""
ASKED_PER_S: Final = 20.0
"""Average lookups a second. A policy is missing from the cache only for the milliseconds that its watch takes."""
ASKED_BURST: Final = 50.0
"""Maximum number of lookups at once: one tool may create as many policies with their jobs."""
Key = tuple[str, str]


class LookupFailed(Exception):
    """The lookup of a policy failed; the text is the cause."""


class Policies:
    """The cache of every CheckpointPolicy in the cluster."""

    def __init__(self, api: client.Client) -> None:
        self._client = api
        self._reflector = reflector.Reflector(
            api, paths.POLICIES.everywhere, checkpoint_policy.from_object, on_change=self._changed
        )
        self._lookups: dict[Key, asyncio.Task[CheckpointPolicy | None]] = {}
        self._missing: OrderedDict[Key, float] = OrderedDict()
        self._questions = ASKED_BURST
        """Lookups that are allowed now; see `ASKED_PER_S`."""
        self._counted_s = time.monotonic()

    @property
    def ready(self) -> bool:
        """Whether every policy was listed once."""
        return self._reflector.synced.is_set()

    async def run(self) -> None:
        """Maintain the cache. Blocks: until it is cancelled."""
        watching = asyncio.create_task(self._reflector.run(), name="policies")
        try:
            await self._reflector.synced.wait()
            metrics.POLICY_CACHE_SYNCED.set(1)
            await watching
        finally:
            watching.cancel()
            await asyncio.gather(watching, *self._lookups.values(), return_exceptions=True)

    async def find(self, namespace: str, name: str) -> CheckpointPolicy | None:
        """
        The policy of that name, or None: there is none.

        Raises:
            LookupFailed: the API server does not answer, or too many lookups are in progress.
        """
        cached = self._reflector.get(namespace, name)
        if cached is not None:
            metrics.POLICY_LOOKUPS.labels("cache").inc()
            return cached
        key = (namespace, name)
        if time.monotonic() < self._missing.get(key, 0.0):
            metrics.POLICY_LOOKUPS.labels("cache").inc()
            return None
        if key not in self._lookups:
            self._count_question()
            task = asyncio.create_task(self._ask(key), name="policy")
            self._lookups[key] = task
            task.add_done_callback(lambda _: self._lookups.pop(key, None))
        # The first caller may be cancelled before the answer comes; the others still need it.
        return await asyncio.shield(self._lookups[key])

    def _count_question(self) -> None:
        now_s = time.monotonic()
        self._questions = min(ASKED_BURST, self._questions + (now_s - self._counted_s) * ASKED_PER_S)
        self._counted_s = now_s
        if self._questions < 1 or len(self._lookups) >= ASKED_AT_ONCE:
            metrics.POLICY_LOOKUPS.labels("refused").inc()
            raise LookupFailed("too many lookups of policies that are not in the cache")
        self._questions -= 1

    async def _ask(self, key: Key) -> CheckpointPolicy | None:
        metrics.POLICY_LOOKUPS.labels("api").inc()
        namespace, name = key
        try:
            document = await self._client.get(paths.POLICIES.one(namespace, name), timeout_s=LOOKUP_S)
        except client.NotFound:
            self._missing[key] = time.monotonic() + MISSING_S
            self._missing.move_to_end(key)
            while len(self._missing) > MAX_MISSING:
                self._missing.popitem(last=False)
            return None
        except (client.ApiError, client.Unreachable) as err:
            raise LookupFailed(f"policy {name} could not be looked up: {err}") from err
        return checkpoint_policy.from_object(document)

    def _changed(self, key: Key, old: CheckpointPolicy | None, new: CheckpointPolicy | None) -> None:
        self._missing.pop(key, None)
        metrics.POLICY_CACHE_SIZE.set(len(self._reflector))
