"""
The whole of: the cache of CheckpointPolicy objects: fed by kopf, object by object, and by a periodic list of all.

Called from: `handlers`, which feeds it; answers to jobs, and `reconcile`.
Must never: wait, or call the API server: answers to jobs are made from the cache.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pillion.wire import policy
from pillion_operator.home import server
from pillion_operator.injection import checkpoint_policy
from pillion_operator.injection.checkpoint_policy import CheckpointPolicy

Json = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A CheckpointPolicy object."""

    namespace: str
    parsed: CheckpointPolicy
    now: server.PolicyNow
    """The policy as it is sent to jobs."""
    status: Json
    version: str

    @property
    def key(self) -> Key:
        return self.namespace, self.parsed.name

    @property
    def about(self) -> Json:
        """The reference to it in an event."""
        named = {"namespace": self.namespace, "name": self.parsed.name, "uid": self.parsed.uid}
        return {"apiVersion": policy.API_VERSION, "kind": policy.KIND} | named


def project(document: Json) -> Policy:
    """A CheckpointPolicy object as the API server gives it."""
    metadata = document["metadata"]
    parsed = checkpoint_policy.from_object(document)
    now = server.PolicyNow(policy.dump(parsed.spec), parsed.generation) if parsed.spec else server.NO_POLICY
    return Policy(
        namespace=str(metadata.get("namespace") or ""),
        parsed=parsed,
        now=now,
        status=document.get("status") or {},
        version=str(metadata.get("resourceVersion") or ""),
    )


class Policies:
    """All of them, by namespace and name."""

    def __init__(self, on_change: Callable[[Key], None]) -> None:
        """
        Args:
            on_change: called with the key of each one that is new, gone or another.
        """
        self._on_change = on_change
        self._policies: dict[Key, Policy] = {}

    def get(self, namespace: str, name: str) -> Policy | None:
        """The policy, or None where there is none."""
        return self._policies.get((namespace, name))

    def all_keys(self) -> list[Key]:
        """All that there are."""
        return list(self._policies)

    def now(self, namespace: str, name: str) -> server.PolicyNow:
        """The policy as it is sent to the jobs under it."""
        entry = self._policies.get((namespace, name))
        return entry.now if entry else server.NO_POLICY

    def put(self, entry: Policy) -> None:
        """Store a policy."""
        before = self._policies.get(entry.key)
        self._policies[entry.key] = entry
        if before is None or before.version != entry.version:
            self._on_change(entry.key)

    def remove(self, key: Key) -> None:
        """Forget a policy."""
        if self._policies.pop(key, None) is not None:
            self._on_change(key)

    def replace_all(self, entries: Iterable[Policy]) -> None:
        """Replace all policies, which also drops those that were deleted while the watch was interrupted."""
        policies: Collection[Policy] = list(entries)
        for key in self._policies.keys() - {each.key for each in policies}:
            self.remove(key)
        for each in policies:
            self.put(each)
