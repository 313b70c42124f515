"""
The whole of: a fake of Google Cloud Storage, in memory: the part of its XML API that obstore speaks. No emulator that a registry has takes it.

Called from: `servers`.
Must never: accept what the real one refuses: an old generation, a bucket that is not there, a deletion of what is not there.
"""

import asyncio
import email.utils
import hashlib
import time
import urllib.parse
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, final
from xml.sax.saxutils import escape

from support.object_stores import http1
from support.object_stores.http1 import Answer

PAGE: Final = 1000
"""Maximum number of entries of one page of a listing, as of the real one."""
_CONDITION: Final = "x-goog-if-generation-match"


@final
@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    generation: int
    written_s: float

    def headers(self) -> http1.Headers:
        return [
            ("ETag", f'"{hashlib.md5(self.data, usedforsecurity=False).hexdigest()}"'),
            ("x-goog-generation", str(self.generation)),
            ("Last-Modified", email.utils.formatdate(self.written_s, usegmt=True)),
        ]


@final
class FakeGcs(http1.Server):
    """
    The fake, while in ``with``. It asks nobody who they are.

    Args:
        page: most entries of one page of a listing.
    """

    def __init__(self, *, page: int = PAGE) -> None:
        super().__init__()
        self._page = page
        self._buckets: dict[str, dict[str, _Object]] = {}
        self._generation = 0

    def make_bucket(self, name: str) -> None:
        """
        An empty bucket.
        """
        self._buckets[name] = {}

    async def serve(self, request: http1.Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """
        One request. Nothing is awaited between a look at an object and its change, so the store is linearizable.
        """
        answer = self._decide(await http1.read_body(reader, writer, request))
        if request.method == "HEAD":
            await http1.write(writer, answer.head(len(answer.body)))
        else:
            await http1.write(writer, answer.head(len(answer.body)) + answer.body)
        return True

    def _decide(self, request: http1.Request) -> Answer:
        target = urllib.parse.urlsplit(request.target)
        name, _, key = urllib.parse.unquote(target.path).lstrip("/").partition("/")
        query = dict(urllib.parse.parse_qsl(target.query, keep_blank_values=True))
        bucket = self._buckets.get(name)
        if bucket is None:
            return _error(404, "NoSuchBucket")
        match request.method:
            case "GET" if "list-type" in query:
                return _list(bucket, query, self._page)
            case "GET" | "HEAD":
                return _read(bucket, key, http1.header(request.headers, "range"))
            case "PUT" if not query:
                return self._put(bucket, key, request)
            case "DELETE" if not query:
                return Answer(status=204) if bucket.pop(key, None) else _error(404, "NoSuchKey")
        return _error(501, "NotImplemented")

    def _put(self, bucket: dict[str, _Object], key: str, request: http1.Request) -> Answer:
        data = request.body
        if source := http1.header(request.headers, "x-goog-copy-source"):
            there = bucket.get(urllib.parse.unquote(source).lstrip("/").partition("/")[2])
            if there is None:
                return _error(404, "NoSuchKey")
            data = there.data
        expected = http1.header(request.headers, _CONDITION)
        generation = bucket[key].generation if key in bucket else 0
        if expected is not None and int(expected) != generation:
            return _error(412, "PreconditionFailed")
        self._generation += 1
        bucket[key] = _Object(data, self._generation, time.time())
        return Answer(status=200, headers=bucket[key].headers())


def _read(bucket: dict[str, _Object], key: str, stretch: str | None) -> Answer:
    there = bucket.get(key)
    if there is None:
        return _error(404, "NoSuchKey")
    if stretch is None:
        return Answer(status=200, headers=there.headers(), body=there.data)
    first, last = (int(each) for each in stretch.removeprefix("bytes=").split("-"))
    body = there.data[first : last + 1]
    if not body:
        return _error(416, "InvalidRange")
    span = ("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(there.data)}")
    return Answer(status=206, headers=[*there.headers(), span], body=body)


def _list(bucket: dict[str, _Object], query: dict[str, str], page: int) -> Answer:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = max(query.get("start-after", ""), query.get("continuation-token", ""))
    entries: dict[str, str] = {}
    for key in sorted(bucket):
        within, found, _ = key.removeprefix(prefix).partition(delimiter) if delimiter else (key, "", "")
        name = f"{prefix}{within}{found}" if found else key
        if key.startswith(prefix) and name > after:
            entries[name] = _folder_entry(name) if found else _object_entry(key, bucket[key])
    names = list(entries)
    shown = "".join(entries[name] for name in names[:page])
    more = f"<NextContinuationToken>{escape(names[page - 1])}</NextContinuationToken>" if len(names) > page else ""
    return Answer(status=200, body=f"<ListBucketResult>{shown}{more}</ListBucketResult>".encode())


def _folder_entry(name: str) -> str:
    return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"


def _object_entry(key: str, there: _Object) -> str:
    written = datetime.fromtimestamp(there.written_s, UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>{written}Z</LastModified>"
        f"<ETag>{escape(dict(there.headers())['ETag'])}</ETag><Size>{len(there.data)}</Size></Contents>"
    )


def _error(status: int, code: str) -> Answer:
    return Answer(status=status, body=f"<Error><Code>{code}</Code></Error>".encode())
