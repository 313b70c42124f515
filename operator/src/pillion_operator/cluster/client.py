"""
The whole of: requests to the API server, in plain JSON. A failure is one of three kinds of error.

Called from: the event loop of webhook and controller. `kubernetes.aio` does configuration, TLS and tokens, and only that: its typed
models drop fields that they do not know.
Must never: wait without a bound, or log a body.
"""

import asyncio
import contextlib
import json
import math
import os
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import configuration, rest

from pillion_operator import metrics

Json = dict[str, Any]

REQUEST_TIMEOUT_S: Final = 15.0
"""Timeout for one whole request. A healthy API server answers in milliseconds, and a restarting one is back in seconds."""
CONNECT_TIMEOUT_S: Final = 5.0
"""Timeout for connecting with TLS. It is short, so that a dead node is noticed while another API server can still be tried."""
PAGE_SIZE: Final = 500
"""Maximum number of objects in one page of a list, as in client-go, so that no page holds up the loop."""
MOST_RETRIES: Final = 3
MAX_RETRY_AFTER_S: Final = 5.0
"""
Maximum wait that the server may request with a 429 (API priority and fairness). The server has done nothing by then, so the
request is repeated.
"""
LONGEST_EVENT_BYTES: Final = 8 * 1024 * 1024
"""
Maximum length of one line of a watch. etcd stores no object above 1.5 MiB; JSON and managedFields make it several times longer.
"""
FIELD_MANAGER: Final = "pillion-controller"
_METADATA_ONLY: Final = "application/json;as=PartialObjectMetadata{kind};g=meta.k8s.io;v=v1"


class ApiError(Exception):
    """The API server refused a request."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class NotFound(ApiError):
    """There is no such object, or no such resource."""


class Conflict(ApiError):
    """The object was changed meanwhile, or exists already."""


class Gone(ApiError):
    """The resource version, or the page, is too old: list again."""


class Unreachable(Exception):
    """No answer: the network, TLS, or the bound of a request. The request may have been done."""


class PatchKind(StrEnum):
    """Kind of a patch; its value is the content type."""

    MERGE = "application/merge-patch+json"
    JSON = "application/json-patch+json"
    APPLY = "application/apply-patch+yaml"


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One line of a watch."""

    kind: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    object: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Address and credentials of an API server, for a library with its own client. Must never be logged."""

    server: str
    authority: str | None
    """File of the certificates that it is trusted by; None: those of the machine."""
    verify: bool
    certificate: str | None
    """File of our own certificate; None: there is none."""
    key: str | None
    token: str
    """Current bearer token; empty if there is none."""


class Client:
    """
    Access to one API server.

    Owns: its connections; `async with` closes them. One is enough for a process.
    """

    def __init__(self, api_configuration: configuration.Configuration) -> None:
        # client-go verifies as Python did before 3.13: the authorities of many clusters lack an Authority Key Identifier.
        api_configuration.disable_strict_ssl_verification = True
        self._configuration = api_configuration
        self._rest = rest.RESTClientObject(api_configuration)

    @classmethod
    async def connect(cls, kubeconfig: str = "") -> "Client":
        """
        A client for the cluster that this pod runs in, else for the one that KUBECONFIG names. Opens no connection yet.

        Args:
            kubeconfig: path of a file to be used in any case.

        Raises:
            Unreachable: neither is there, or it cannot be used.
        """
        api_configuration = configuration.Configuration()
        try:
            if kubeconfig or not os.environ.get("KUBERNETES_SERVICE_HOST"):
                path = kubeconfig or os.environ.get("KUBECONFIG") or None
                await config.load_kube_config(
                    config_file=path, client_configuration=api_configuration, persist_config=False
                )
            else:
                config.load_incluster_config(client_configuration=api_configuration)
            return cls(api_configuration)
        except (config.ConfigException, OSError, ssl.SSLError) as err:
            raise Unreachable(f"no API server is configured: {err}") from err

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._rest.close()

    async def connection(self) -> Connection:
        """Address and current credentials of this API server: a token lives for an hour."""
        api_configuration = self._configuration
        # The loader for a pod writes "bearer", the one for a kubeconfig "Bearer".
        _, _, token = str(await api_configuration.get_api_key_with_prefix("BearerToken") or "").partition(" ")
        return Connection(
            server=api_configuration.host,
            authority=api_configuration.ssl_ca_cert,
            verify=api_configuration.verify_ssl,
            certificate=api_configuration.cert_file,
            key=api_configuration.key_file,
            token=token.strip(),
        )

    async def get(self, path: str, *, metadata_only: bool = False, timeout_s: float = REQUEST_TIMEOUT_S) -> Json:
        """
        One object.

        Raises:
            ApiError: `NotFound` and others.
            Unreachable: no answer within `timeout_s`.
        """
        return await self._request("GET", path, accept=_accept("", metadata_only), timeout_s=timeout_s)

    async def list(
        self, path: str, *, label_selector: str = "", field_selector: str = "", metadata_only: bool = False
    ) -> Json:
        """
        All objects of a collection, in as many requests as it takes: `items`, and `metadata.resourceVersion` to watch from.

        Raises:
            ApiError, Unreachable: see `get`.
        """
        items: list[Json] = []
        metadata: Json = {}
        pages = self.pages(
            path, label_selector=label_selector, field_selector=field_selector, metadata_only=metadata_only
        )
        async for page in pages:
            items += page.get("items") or []
            metadata = page.get("metadata") or {}
        return {"metadata": metadata, "items": items}

    async def pages(
        self, path: str, *, label_selector: str = "", field_selector: str = "", metadata_only: bool = False
    ) -> AsyncGenerator[Json]:
        """
        The same page by page, for a caller that keeps only a part of each object.

        Raises:
            ApiError: also `Gone`, when the pages took longer than the server keeps them.
            Unreachable: see `get`.
        """
        query = _query(labelSelector=label_selector, fieldSelector=field_selector, limit=PAGE_SIZE)
        accept = _accept("List", metadata_only)
        while True:
            page = await self._request("GET", path, query=query, accept=accept, verb="list")
            yield page
            more = (page.get("metadata") or {}).get("continue")
            if not more:
                return
            query["continue"] = more

    async def create(self, path: str, body: Json, *, timeout_s: float = REQUEST_TIMEOUT_S) -> Json:
        """
        Make an object in the collection `path`.

        Raises:
            ApiError: `Conflict`, when it exists.
            Unreachable: see `get`.
        """
        return await self._request("POST", path, body=body, query=_manager(), verb="create", timeout_s=timeout_s)

    async def replace(self, path: str, body: Json, *, timeout_s: float = REQUEST_TIMEOUT_S) -> Json:
        """
        Put an object in the place of what is there.

        Raises:
            ApiError: `Conflict`, when it is not the version that `body` names.
            Unreachable: see `get`.
        """
        return await self._request("PUT", path, body=body, query=_manager(), verb="update", timeout_s=timeout_s)

    async def delete(self, path: str, *, uid: str = "") -> Json:
        """
        Remove an object.

        Args:
            path: of the object.
            uid: that it has to have, so that its successor of the same name is safe. Empty: any.

        Raises:
            ApiError: `NotFound`; `Conflict`, when it is another one.
            Unreachable: see `get`.
        """
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}} if uid else None
        return await self._request("DELETE", path, body=body, verb="delete")

    async def patch(
        self, path: str, body: Any, *, kind: PatchKind = PatchKind.MERGE, subresource: str = "", force: bool = True
    ) -> Json:
        """
        Change an object.

        Args:
            path: of the object.
            body: of the kind in `kind`: an object, or a list of operations.
            kind: see `PatchKind`.
            subresource: ``status``, or empty for the object itself.
            force: of APPLY only: whether fields that another manager owns are taken over.

        Raises:
            ApiError: `NotFound`; `Conflict`, when `body` names a version or a value that is not there.
            Unreachable: see `get`.
        """
        query = _manager() | ({"force": "true"} if force and kind is PatchKind.APPLY else {})
        where = f"{path}/{subresource}" if subresource else path
        return await self._request("PATCH", where, body=body, query=query, content_type=kind.value, verb="patch")

    async def watch(
        self,
        path: str,
        *,
        resource_version: str,
        label_selector: str = "",
        field_selector: str = "",
        metadata_only: bool = False,
        timeout_s: float = 300.0,
        idle_s: float = 90.0,
    ) -> AsyncGenerator[WatchEvent]:
        """
        What changes in a collection, bookmarks included, until the server ends the stream.

        Args:
            path: of the collection.
            resource_version: after which changes are wanted.
            label_selector: as in `list`, and so are the next two.
            field_selector: see there.
            metadata_only: see there.
            timeout_s: after which the server is to end the stream; rounded up to whole seconds.
            idle_s: how long nothing at all may come. Then the stream ends, as if the server had ended it.

        Raises:
            ApiError: `Gone`, when the version is too old.
            Unreachable: the connection broke.
        """
        query = _query(
            watch="true",
            allowWatchBookmarks="true",
            resourceVersion=resource_version,
            # In whole seconds, and never zero, which selects the server's default of half an hour or more.
            timeoutSeconds=max(1, math.ceil(timeout_s)),
            labelSelector=label_selector,
            fieldSelector=field_selector,
        )
        headers = await self._headers(_accept("", metadata_only))
        bound = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=idle_s)
        with _translated():
            response = await self._send("GET", path, query, headers, None, bound)
            try:
                await _raise_for_status(response, "watch")
                with contextlib.suppress(aiohttp.SocketTimeoutError):
                    async for line in _lines(response.content):
                        yield _event(line)
            finally:
                # Not back to the pool: what was read of it is not all that comes. No farewell either, which a peer that is
                # gone would keep us waiting for.
                if response.connection is not None and response.connection.transport is not None:
                    response.connection.transport.abort()
                response.close()

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
        content_type: str = "application/json",
        verb: str = "get",
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Json:
        with _translated(verb):
            async with asyncio.timeout(timeout_s):
                for attempt in range(MOST_RETRIES + 1):
                    headers = await self._headers(accept) | {"Content-Type": content_type}
                    bound = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
                    response = await self._send(method, path, query, headers, body, bound)
                    async with response:
                        wait_s = response.headers.get("Retry-After", "")
                        if response.status != 429 or not wait_s.isdecimal() or attempt == MOST_RETRIES:
                            await _raise_for_status(response, verb)
                            return _object(await response.read())
                    await asyncio.sleep(min(float(wait_s), MAX_RETRY_AFTER_S))
        raise AssertionError("the last attempt returns or raises")

    async def _headers(self, accept: str) -> dict[str, str]:
        # Reads the token's file again when it is a minute old.
        headers = {"Accept": accept, "User-Agent": "pillion-operator"}
        if token := await self._configuration.get_api_key_with_prefix("BearerToken"):
            headers["Authorization"] = token
        return headers

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        headers: dict[str, str],
        body: Any,
        bound: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        url = self._configuration.host + path + (f"?{urlencode(query)}" if query else "")
        answer = await self._rest.request(method, url, headers=headers, body=body, _request_timeout=bound)
        response: aiohttp.ClientResponse = answer.response
        return response


def _accept(kind: str, metadata_only: bool) -> str:
    return _METADATA_ONLY.format(kind=kind) if metadata_only else "application/json"


def _query(**parts: str | int) -> dict[str, str]:
    return {name: str(value) for name, value in parts.items() if value != ""}


def _manager() -> dict[str, str]:
    return {"fieldManager": FIELD_MANAGER}


@contextlib.contextmanager
def _translated(verb: str = "watch") -> Any:
    """Every way in which there is no answer is one error."""
    try:
        yield
    # A port that speaks no HTTP, and a certificate that cannot be read, raise ValueError.
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, config.ConfigException) as err:
        metrics.API_REQUESTS.labels(verb, "0").inc()
        raise Unreachable(f"{type(err).__name__}: {err}") from err


async def _raise_for_status(response: aiohttp.ClientResponse, verb: str) -> None:
    metrics.API_REQUESTS.labels(verb, str(response.status)).inc()
    if response.status >= 400:
        text = (await response.read()).decode(errors="replace")
        try:
            status = json.loads(text)
        except ValueError:
            status = {}
        raise _error(response.status, status if isinstance(status, dict) else {}, text)


def _error(code: int, status: Json, text: str = "") -> ApiError:
    kind = {404: NotFound, 409: Conflict, 410: Gone}.get(code, ApiError)
    return kind(code, str(status.get("reason") or ""), str(status.get("message") or text)[:2000])


def _object(body: bytes) -> Json:
    document = json.loads(body)
    if not isinstance(document, dict):
        raise ValueError("the answer is no JSON object")
    return document


def _event(line: bytes) -> WatchEvent:
    document = _object(line)
    kind, body = str(document.get("type")), document.get("object")
    if not isinstance(body, dict):
        raise ValueError("an event of the watch has no object")
    if kind == "ERROR":
        raise _error(int(body.get("code") or 500), body)
    return WatchEvent(kind, body)


async def _lines(stream: aiohttp.StreamReader) -> AsyncGenerator[bytes]:
    """The lines of a stream; StreamReader's own would end with an error at a long one."""
    pending = bytearray()
    async for chunk in stream.iter_any():
        pending += chunk
        while (end := pending.find(b"\n")) >= 0:
            line = bytes(pending[:end])
            del pending[: end + 1]
            if line.strip():
                yield line
        if len(pending) > LONGEST_EVENT_BYTES:
            raise ValueError(f"an event of the watch is longer than {LONGEST_EVENT_BYTES} bytes")
