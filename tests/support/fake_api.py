"""
The whole of: an API server that keeps any objects, and does on demand what a real one does seldom.

Called from: tests of the level `process`, where no cluster is. It passes `support.api_contract`, as the real one does.
Must never: know a resource; validation, defaults and admission are the real server's.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from aiohttp import web

from support.background import Background

Json = dict[str, Any]
SERVER_WATCH_S: Final = 1800
"""Duration of a watch that asks for zero seconds, as in the real API server (its flag --min-request-timeout)."""
_KEPT: Final = 10_000
"""Events of the past that a watch can begin from."""


@dataclass(frozen=True, slots=True)
class Where:
    """
    A collection, or an object in it.
    """

    group: str
    namespace: str
    resource: str
    name: str

    def covers(self, other: "Where", name: str) -> bool:
        """
        Whether the other is an object of this collection, which is of one namespace or of all; `name` selects one of it.
        """
        return (
            (self.group, self.resource) == (other.group, other.resource)
            and self.namespace in ("", other.namespace)
            and name in ("", other.name)
        )


@dataclass(slots=True)
class _Faults:
    refuse: int = 0
    """Status that every request is answered with; 0: none."""
    silent: bool = False
    """Whether streams say nothing at all, not even a bookmark."""


class FakeApi:
    """
    The server, while in ``with``. Its methods may be called from any thread.
    """

    def __init__(self) -> None:
        self.port = 0
        self.requests: list[tuple[str, str]] = []
        """Verb and path of every request that came, in order."""
        self._background = Background()
        self._objects: dict[Where, Json] = {}
        self._version = 100
        self._oldest = 0
        self._history: list[tuple[int, str, Where, Json]] = []
        self._changed = asyncio.Event()
        self._faults = _Faults()
        self._streams: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> Self:
        self._background.__enter__()
        self._background.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._background.run(self._stop())
        self._background.__exit__()

    def kubeconfig(self, folder: Path) -> Path:
        """
        A file that leads to this server.
        """
        return write_kubeconfig(folder, {"server": f"http://127.0.0.1:{self.port}"})

    # --- what is there

    def put(self, path: str, document: Json) -> Json:
        """
        Make or change an object; `path` is of the object.
        """
        return self._background.call(lambda: self._put(_where(path), document))

    def remove(self, path: str) -> None:
        self._background.call(lambda: self._remove(_where(path)))

    def find(self, path: str) -> list[Json]:
        """
        The objects of a collection.
        """
        return self._background.call(lambda: self._select(_where(path), ""))

    def count(self, verb: str, path: str = "") -> int:
        """
        Requests so far, of a verb (get, list, watch, create, ...) and, when given, for this path.
        """
        return sum(1 for each in list(self.requests) if each[0] == verb and path in ("", each[1]))

    # --- what goes wrong

    def end_streams(self) -> None:
        """
        End every watch, as a server does after a while.
        """
        self._background.call(lambda: [task.cancel() for task in self._streams])

    def forget(self) -> None:
        """
        Forget the past: a watch from before now is answered with 410.
        """

        def do() -> None:
            self._version += 1
            self._oldest = self._version
            self._history.clear()

        self._background.call(do)

    def refuse(self, status: int) -> None:
        """
        Answer everything with this status; 0: be well again.
        """
        self._background.call(lambda: setattr(self._faults, "refuse", status))

    def be_silent(self, silent: bool = True) -> None:
        """
        Say nothing on any stream, however much happens.
        """
        self._background.call(lambda: setattr(self._faults, "silent", silent))

    def stop(self) -> None:
        """
        Close the port and every connection, and keep the objects.
        """
        self._background.run(self._stop())

    def start(self) -> None:
        """
        Open the same port again.
        """
        self._background.run(self._start())

    # --- inside

    async def _start(self) -> None:
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        for task in list(self._streams):
            task.cancel()
        await self._runner.cleanup()

    def _put(self, where: Where, document: Json, kind: str = "") -> Json:
        before = self._objects.get(where)
        self._version += 1
        uid = before["metadata"]["uid"] if before else str(uuid.uuid4())
        metadata = {**document.get("metadata", {}), "name": where.name, "resourceVersion": str(self._version)}
        metadata |= {"uid": uid} | ({"namespace": where.namespace} if where.namespace else {})
        stored = {**document, "metadata": metadata}
        self._objects[where] = stored
        self._tell(kind or ("MODIFIED" if before else "ADDED"), where, stored)
        return stored

    def _remove(self, where: Where) -> None:
        self._version += 1
        gone = self._objects.pop(where)
        self._tell("DELETED", where, {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self._version)}})

    def _tell(self, kind: str, where: Where, document: Json) -> None:
        self._history = [*self._history, (self._version, kind, where, document)][-_KEPT:]
        self._changed.set()
        self._changed = asyncio.Event()

    def _select(self, where: Where, name: str) -> list[Json]:
        return [found for at, found in self._objects.items() if where.covers(at, name)]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        where, query = _where(request.path), request.query
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(request.method, "")
        verb = verb or ("get" if where.name else "watch" if query.get("watch") else "list")
        self.requests.append((verb, request.path))
        if self._faults.refuse:
            return _status(self._faults.refuse, "Refused", "as it was told to")
        name = query.get("fieldSelector", "").removeprefix("metadata.name=")
        if verb == "list":
            return self._list(request, self._select(where, name))
        if verb == "watch":
            return await self._watch(request, where, name)
        if verb == "create":
            body = await request.json()
            made = Where(where.group, where.namespace, where.resource, body["metadata"]["name"])
            if made in self._objects:
                return _status(409, "AlreadyExists", f"{made.name} exists")
            return web.json_response(self._put(made, body), status=201)
        found = self._objects.get(where)
        if found is None:
            return _status(404, "NotFound", f'{where.resource} "{where.name}" not found')
        if verb == "get":
            return web.json_response(_metadata_only(found) if "PartialObject" in request.headers["Accept"] else found)
        body = await request.json() if request.can_read_body else {}
        return self._write(verb, where, found, body)

    def _write(self, verb: str, where: Where, found: Json, body: Json) -> web.Response:
        if verb == "delete":
            if body.get("preconditions", {}).get("uid", found["metadata"]["uid"]) != found["metadata"]["uid"]:
                return _status(409, "Conflict", "another uid")
            self._remove(where)
            return web.json_response({"kind": "Status", "status": "Success"})
        version = body.get("metadata", {}).get("resourceVersion")
        if version not in (None, found["metadata"]["resourceVersion"]):
            return _status(409, "Conflict", "the object has been modified")
        return web.json_response(self._put(where, body if verb == "update" else _merged(found, body)))

    def _list(self, request: web.Request, found: list[Json]) -> web.Response:
        begin, limit = int(request.query.get("continue") or 0), int(request.query.get("limit") or len(found) or 1)
        items = found[begin : begin + limit]
        if "PartialObject" in request.headers["Accept"]:
            items = [_metadata_only(each) for each in items]
        metadata = {"resourceVersion": str(self._version)}
        if begin + limit < len(found):
            metadata["continue"] = str(begin + limit)
        return web.json_response({"kind": "List", "metadata": metadata, "items": items})

    async def _watch(self, request: web.Request, where: Where, name: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        version = int(request.query["resourceVersion"])
        if version < self._oldest:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            return response
        whole = "PartialObject" not in request.headers["Accept"]
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            async with asyncio.timeout(int(request.query["timeoutSeconds"]) or SERVER_WATCH_S):
                async for kind, found in self._events(version, where, name):
                    document = {"type": kind, "object": found if whole else _metadata_only(found)}
                    await response.write(json.dumps(document).encode() + b"\n")
        except (TimeoutError, ConnectionError):
            pass
        except asyncio.CancelledError:
            # The end of this stream, not of the server.
            with contextlib.suppress(ConnectionError):
                await response.write_eof()
        finally:
            self._streams.discard(task)
        return response

    async def _events(self, version: int, where: Where, name: str) -> AsyncGenerator[tuple[str, Json]]:
        while True:
            changed = self._changed
            for at, kind, whose, document in list(self._history):
                if at > version and not self._faults.silent:
                    version = at
                    if where.covers(whose, name):
                        yield kind, document
            await changed.wait()


def write_kubeconfig(folder: Path, cluster: Json, user: Json | None = None) -> Path:
    """
    A kubeconfig of one cluster and one user.
    """
    path = folder / f"kubeconfig-{uuid.uuid4().hex[:8]}"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "it", "cluster": cluster}],
        "users": [{"name": "it", "user": user or {}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
        "current-context": "it",
    }
    path.write_text(json.dumps(document))
    return path


def _where(path: str) -> Where:
    parts = path.strip("/").split("/")
    group, rest = ("/".join(parts[:2]), parts[2:]) if parts[0] == "api" else ("/".join(parts[:3]), parts[3:])
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    return Where(group, namespace, rest[0], rest[1] if len(rest) > 1 else "")


def _metadata_only(document: Json) -> Json:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": document["metadata"]}


def _merged(before: Any, change: Any) -> Any:
    """
    RFC 7396.
    """
    if not isinstance(change, dict) or not isinstance(before, dict):
        return change
    names = before.keys() | change.keys()
    found = {name: _merged(before.get(name), change[name]) if name in change else before[name] for name in names}
    return {name: each for name, each in found.items() if each is not None}


def _status(code: int, reason: str, message: str) -> web.Response:
    document = {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}
    return web.json_response(document, status=code)
