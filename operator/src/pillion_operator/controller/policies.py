"""
The whole of: the CheckpointPolicy objects as they are: fed by kopf, object by object, and by a list of all now and then.

Called from: `handlers`, which feeds it; answers to jobs, and `reconcile`.
Must never: wait, or ask the API server: an answer to a job is made from what is here.
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
    found: CheckpointPolicy
    now: server.PolicyNow
    """What jobs are told of it."""
    status: Json
    version: str

    @property
    def key(self) -> Key:
        return self.namespace, self.found.name

    @property
    def about(self) -> Json:
        """What an event on it refers to."""
        named = {"namespace": self.namespace, "name": self.found.name, "uid": self.found.uid}
        return {"apiVersion": policy.API_VERSION, "kind": policy.KIND} | named


def project(document: Json) -> Policy:
    """A CheckpointPolicy object as the API server gives it."""
    metadata = document["metadata"]
    found = checkpoint_policy.from_object(document)
    now = server.PolicyNow(policy.dump(found.spec), found.generation) if found.spec else server.NO_POLICY
    return Policy(
        namespace=str(metadata.get("namespace") or ""),
        found=found,
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
        self._known: dict[Key, Policy] = {}

    def get(self, namespace: str, name: str) -> Policy | None:
        """The policy, or None where there is none."""
        return self._known.get((namespace, name))

    def all_keys(self) -> list[Key]:
        """All that there are."""
        return list(self._known)

    def now(self, namespace: str, name: str) -> server.PolicyNow:
        """What jobs under a policy are told of it."""
        found = self._known.get((namespace, name))
        return found.now if found else server.NO_POLICY

    def put(self, found: Policy) -> None:
        """Know a policy as it is."""
        before = self._known.get(found.key)
        self._known[found.key] = found
        if before is None or before.version != found.version:
            self._on_change(found.key)

    def remove(self, key: Key) -> None:
        """Forget a policy."""
        if self._known.pop(key, None) is not None:
            self._on_change(key)

    def replace_all(self, found: Iterable[Policy]) -> None:
        """Know these and no others: what went while nobody watched is gone then."""
        there: Collection[Policy] = list(found)
        for key in self._known.keys() - {each.key for each in there}:
            self.remove(key)
        for each in there:
            self.put(each)
