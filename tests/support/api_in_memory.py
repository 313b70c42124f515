"""
The whole of: an API server in memory, as far as `cluster.client.Client` is asked by what is tested with it: objects by path, UIDs,
versions, the status subresource, merge patches, and a TokenReview that says what a test wants.

Called from: the tests of call-home and of the controller's writer. What a real API server does is shown in tests/cluster.
Must never: accept what a real one refuses, as far as it knows.
"""

import asyncio
import copy
from collections.abc import Callable, Iterable
from typing import Any

from pillion_operator.cluster import client

Json = dict[str, Any]


class ApiInMemory:
    """Objects by path."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        self.calls: list[tuple[str, str]] = []
        """Verb and path of each request."""
        self.review: Callable[[str], Json] = lambda _: {"status": {"authenticated": False}}
        """Returns the TokenReview of a token."""
        self.fails: list[Exception] = []
        """Errors that the next requests raise, in order."""
        self.gate: asyncio.Event | None = None
        """Event that requests wait for; None: they do not wait."""
        self._made = 0

    def writes(self) -> list[tuple[str, str]]:
        """The calls that changed something."""
        return [each for each in self.calls if each[0] not in ("get", "review")]

    def items(self, kind: str) -> Iterable[Json]:
        """The objects of a collection, in all namespaces."""
        return [each for path, each in sorted(self.objects.items()) if path.split("/")[-2] == kind]

    async def get(self, path: str, *, metadata_only: bool = False, timeout_s: float = 0.0) -> Json:
        del metadata_only, timeout_s
        await self._called("get", path)
        return copy.deepcopy(self._find(path))

    async def create(self, path: str, body: Json) -> Json:
        if path.endswith("/tokenreviews"):
            await self._called("review", path)
            return self.review(body["spec"]["token"])
        await self._called("create", path)
        where = f"{path}/{body['metadata']['name']}"
        if where in self.objects:
            raise client.Conflict(409, "AlreadyExists", where)
        self._made += 1
        made = copy.deepcopy(body) | {"status": {}}
        made["metadata"] |= {"uid": f"uid-{self._made}", "creationTimestamp": "2027-01-15T08:00:00Z"}
        self._store(where, made)
        return copy.deepcopy(made)

    async def patch(self, path: str, body: Json, *, kind: object = None, subresource: str = "") -> Json:
        del kind
        await self._called(f"patch {subresource}".strip(), path)
        found = self._find(path)
        if (body.get("metadata") or {}).get("uid", found["metadata"]["uid"]) != found["metadata"]["uid"]:
            raise client.Conflict(409, "Conflict", "the UID in the precondition does not match")
        before = copy.deepcopy(found)
        merge(found, {key: value for key, value in body.items() if not subresource or key == subresource})
        if found != before:
            self._store(path, found)
        return copy.deepcopy(found)

    async def delete(self, path: str, *, uid: str = "") -> Json:
        await self._called("delete", path)
        found = self._find(path)
        if uid and found["metadata"]["uid"] != uid:
            raise client.Conflict(409, "Conflict", "the UID in the precondition does not match")
        del self.objects[path]
        return {}

    async def _called(self, verb: str, path: str) -> None:
        self.calls.append((verb, path))
        if self.gate is not None:
            await self.gate.wait()
        if self.fails:
            raise self.fails.pop(0)

    def _find(self, path: str) -> Json:
        try:
            return self.objects[path]
        except KeyError:
            raise client.NotFound(404, "NotFound", path) from None

    def _store(self, path: str, found: Json) -> None:
        found["metadata"]["resourceVersion"] = str(int(found["metadata"].get("resourceVersion", "0")) + 1)
        self.objects[path] = found


def merge(target: Json, patch: Json) -> None:
    """RFC 7386."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            inner = target.get(key)
            target[key] = inner if isinstance(inner, dict) else {}
            merge(target[key], value)
        else:
            target[key] = copy.deepcopy(value)
