"""
The whole of: the access modes of the claims that policies name, read from the API server one by one and kept for a while.

Called from: `reconcile`, which writes them into the policy's status, where the webhook sees them. Read one by one, because a watch of
every claim in a cluster would hold tens of thousands of objects for the few that a policy names.
Must never: fail the write of a status, or ask about one claim more often than `ABSENT_S` allows.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from pillion_operator.cluster import client, paths
from pillion_operator.cluster.client import Json
from pillion_operator.controller import policies
from pillion_operator.log import Field

KEPT_S: Final = 600.0
"""Time in seconds for which an answer is valid. The access modes of a claim never change; only another claim of its name has others."""
ABSENT_S: Final = 10.0
"""Time in seconds for which a claim is remembered as absent or unreadable. Many claims are created a moment after their policy."""
MAX_KEPT: Final = 4096
"""Maximum number of remembered answers; beyond it, the oldest is asked for again."""
LOOKUP_S: Final = 2.0
"""Timeout in seconds for one lookup: the writer waits for it."""

_log = logging.getLogger(__name__)


class Claims:
    """Access modes of claims, by policy."""

    def __init__(self, api: client.Client, *, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            api: access to the API server.
            clock: monotonic seconds.
        """
        self._api = api
        self._clock = clock
        self._known: OrderedDict[policies.Key, tuple[float, Json | None]] = OrderedDict()
        """By namespace and claim: until when the answer is valid, monotonic seconds; None: there is no such claim."""

    async def of_policy(self, entry: policies.Policy) -> Json | None:
        """
        The `claim` of a policy's status: name and access modes, or None where the policy names no claim or there is none.

        A claim that cannot be read leaves what the status already says. Blocks: up to `LOOKUP_S`.
        """
        spec = entry.parsed.spec
        wanted = spec.storage.persistent_volume_claim if spec else None
        if wanted is None:
            return None
        key, now_s = (entry.namespace, wanted.claim_name), self._clock()
        until_s, claim = self._known.get(key, (0.0, None))
        if now_s < until_s:
            return claim
        claim, is_read = await self._ask(key, entry.status.get("claim"))
        self._known[key] = now_s + (KEPT_S if is_read else ABSENT_S), claim
        self._known.move_to_end(key)
        while len(self._known) > MAX_KEPT:
            self._known.popitem(last=False)
        return claim

    async def _ask(self, key: policies.Key, before: Json | None) -> tuple[Json | None, bool]:
        """The claim, and whether it was read."""
        namespace, name = key
        try:
            document = await self._api.get(paths.VOLUME_CLAIMS.one(namespace, name), timeout_s=LOOKUP_S)
        except client.NotFound:
            return None, False
        except (client.ApiError, client.Unreachable) as err:
            level = logging.DEBUG if key in self._known else logging.WARNING
            _log.log(level, "cannot read the claim %s: %s", name, err, extra={Field.NAMESPACE: namespace})
            return (before if (before or {}).get("name") == name else None), False
        modes = (document.get("spec") or {}).get("accessModes") or []
        return {"name": name, "accessModes": [str(each) for each in modes]}, True
