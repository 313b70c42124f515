"""
The whole of: what a request asks of an object store, said alike for S3, GCS and Azure, and which requests a test means.

Called from: `fault_proxy`, `faults`, and the tests.
Must never: change a request.
"""

import enum
import re
import urllib.parse
from dataclasses import dataclass
from typing import final

from support.object_stores import http1
from support.object_stores.places import Kind

CONDITIONS = ("if-match", "if-none-match", "x-goog-if-generation-match")
"""Headers that make a request conditional."""


@final
class Operation(enum.Enum):
    """
    What is asked, for one object but for LIST and DELETE_MANY.
    """

    GET = enum.auto()
    HEAD = enum.auto()
    LIST = enum.auto()
    PUT = enum.auto()
    COPY = enum.auto()
    DELETE = enum.auto()
    DELETE_MANY = enum.auto()
    BEGIN_PARTS = enum.auto()
    PUT_PART = enum.auto()
    END_PARTS = enum.auto()
    ABORT_PARTS = enum.auto()


@final
@dataclass(kw_only=True, slots=True)
class Seen:
    """
    A request as it came to the proxy, and what became of it. The second half is filled in as it goes.
    """

    method: str
    operation: Operation
    key: str
    """Key of the object, without the bucket; the prefix of a listing."""
    conditional: bool
    range: str | None
    """Header of that name."""
    fault: str | None = None
    """Name of the fault that struck it."""
    num_bytes_up: int = 0
    """Bytes of the body that the client has sent."""
    num_bytes_down: int = 0
    """Bytes of the body that the client was sent."""
    status: int | None = None
    """Status that the client was sent; None: none, or none yet."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Only:
    """
    Which requests are meant: those that agree in every field that is set.
    """

    operation: Operation | None = None
    method: str | None = None
    key: str | None = None
    """A regular expression that is searched for in the key."""
    conditional: bool | None = None

    def means(self, seen: Seen) -> bool:
        """
        Whether it is one of them.
        """
        return (
            self.operation in (None, seen.operation)
            and self.method in (None, seen.method)
            and self.conditional in (None, seen.conditional)
            and (self.key is None or re.search(self.key, seen.key) is not None)
        )


def read(kind: Kind, request: http1.Request) -> Seen:
    """
    What a request asks. The bucket is in its path.
    """
    target = urllib.parse.urlsplit(request.target)
    query = urllib.parse.parse_qs(target.query, keep_blank_values=True)
    # /bucket/key, or /account/bucket/key.
    num_before = 2 if kind == "azure" else 1
    parts = urllib.parse.unquote(target.path).lstrip("/").split("/", num_before)
    key = parts[num_before] if len(parts) > num_before else ""
    operation = _read_operation(request, query)
    if operation is Operation.LIST:
        key = query.get("prefix", [""])[0]
    return Seen(
        method=request.method,
        operation=operation,
        key=key,
        conditional=any(http1.header(request.headers, name) is not None for name in CONDITIONS),
        range=http1.header(request.headers, "range") or http1.header(request.headers, "x-ms-range"),
    )


def _read_operation(request: http1.Request, query: dict[str, list[str]]) -> Operation:
    part = query.get("comp", [""])[0]
    match request.method:
        case "HEAD":
            return Operation.HEAD
        case "GET":
            return Operation.LIST if "list-type" in query or part == "list" else Operation.GET
        case "DELETE":
            return Operation.ABORT_PARTS if "uploadId" in query else Operation.DELETE
        case "POST":
            if "uploads" in query:
                return Operation.BEGIN_PARTS
            return Operation.END_PARTS if "uploadId" in query else Operation.DELETE_MANY
    if "partNumber" in query or part == "block":
        return Operation.PUT_PART
    if part == "blocklist":
        return Operation.END_PARTS
    copied = any(name.lower().endswith("copy-source") for name, _ in request.headers)
    return Operation.COPY if copied else Operation.PUT
