"""
A client of obstore without a store: a bucket in memory, whose every request can be stopped, lost or refused.

Called from: the model of commits, and the contract of storage, which it passes as the servers do.
Must never: answer otherwise than obstore 0.12.1 does, as far as it is asked.
"""

import builtins
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, final

from obstore.exceptions import AlreadyExistsError, PreconditionError

WRITTEN: Final = datetime(2026, 1, 1, tzinfo=UTC)


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """
    An object, and what tells it from the one before.
    """

    data: bytes
    version: int


Objects = dict[str, Stored]
Request = Callable[[Callable[[], Any], bool], Any]
_ONE: Final = threading.Lock()


def _make(act: Callable[[], Any], conditional: bool) -> Any:
    """One request at a time, as the store decides on them."""
    with _ONE:
        return act()


@final
class Answer:
    """
    What `get` returns.
    """

    def __init__(self, stored: Stored, data: bytes) -> None:
        self._data = data
        self.meta = {"size": len(stored.data), "e_tag": str(stored.version), "version": None, "last_modified": WRITTEN}

    def bytes(self) -> builtins.bytes:
        return self._data

    def stream(self, min_chunk_size: int) -> Iterator[builtins.bytes]:
        yield self._data


@final
class InMemory:
    """
    The client.

    Args:
        objects: key -> object; others may share it, or put another one in its place.
        request: makes a request, which it is given as a function with whether it is a conditional put; it may do so, or not, or raise
            instead of the answer.
    """

    def __init__(self, objects: Objects, request: Request = _make) -> None:
        self.objects = objects
        self.request = request

    def get(self, path: str, *, options: Mapping[str, Any] | None = None) -> Answer:
        def act() -> Answer:
            stored = self._there(path)
            start, end = (options or {}).get("range", (0, len(stored.data)))
            return Answer(stored, stored.data[start:end])

        answer: Answer = self._asked(act)
        return answer

    def head(self, path: str) -> Mapping[str, Any]:
        meta: Mapping[str, Any] = self._asked(lambda: Answer(self._there(path), b"").meta)
        return meta

    def put(self, path: str, file: Any, *, mode: Any = None, use_multipart: bool = True, **_: Any) -> Mapping[str, Any]:
        data = file if isinstance(file, bytes) else b"".join(bytes(each) for each in file)
        put: Mapping[str, Any] = self._asked(lambda: self._put(path, data, mode), conditional=mode is not None)
        return put

    def _put(self, path: str, data: bytes, mode: Any) -> Mapping[str, Any]:
        there = self.objects.get(path)
        if mode == "create" and there is not None:
            raise AlreadyExistsError(f"Object at location {path} already exists")
        if isinstance(mode, dict) and (there is None or mode["e_tag"] != str(there.version)):
            raise PreconditionError(f"Object at location {path} has another version")
        self.objects[path] = Stored(data, there.version + 1 if there else 1)
        return {"e_tag": str(self.objects[path].version), "version": None}

    def delete(self, paths: Any) -> None:
        def act() -> None:
            for path in [paths] if isinstance(paths, str) else paths:
                self.objects.pop(path, None)

        self._asked(act)

    def list_with_delimiter(self, prefix: str | None = None) -> Mapping[str, Any]:
        def act() -> Mapping[str, Any]:
            start = f"{prefix}/" if prefix else ""
            below = sorted(path for path in self.objects if path.startswith(start))
            objects = [
                {"path": path, "size": len(self.objects[path].data), "last_modified": WRITTEN}
                for path in below
                if "/" not in path[len(start) :]
            ]
            deeper = {path[len(start) :].partition("/")[0] for path in below if "/" in path[len(start) :]}
            return {"objects": objects, "common_prefixes": [f"{start}{each}" for each in sorted(deeper)]}

        listed: Mapping[str, Any] = self._asked(act)
        return listed

    def _there(self, path: str) -> Stored:
        if path not in self.objects:
            raise FileNotFoundError(f"Object at location {path} not found")
        return self.objects[path]

    def _asked(self, act: Callable[[], Any], *, conditional: bool = False) -> Any:
        return self.request(act, conditional)
