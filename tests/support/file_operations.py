"""
The whole of: ending or stopping a piece of work between any two of its file operations.

Called from: tests of what a crash, or a process that is stopped for a while, leaves on storage.
Must never: touch what is done outside the folder that it was given, or in another thread than the one that it was asked for.

The interpreter tells audit hooks of every open, rename, link and removal before it happens; an exception raised there is raised in the
place of the operation. So nothing of the product is replaced, and its own clean-up is cut off too, as a SIGKILL cuts it off.
"""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from support.deadlines import Deadline

EVENTS: Final = frozenset(
    {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.listdir", "os.scandir", "shutil.rmtree"}
)
"""Audit events of the interpreter that count as file operations. Reads of a folder count too: another process may change it after the read."""


class Crashed(BaseException):
    """Here the process would have ended."""


@dataclass(slots=True)
class _Watch:
    folder: str
    before: int
    """Operations that still pass."""
    reached: Callable[[], None]
    """Called instead of the operation; when it returns, the operation is done after all."""
    done: bool = field(default=False)


_watches: Final[dict[int, _Watch]] = {}
"""By thread."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    watch = _watches.get(threading.get_ident())
    if watch is None or event not in EVENTS or not arguments:
        return
    path = arguments[0]
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(watch.folder):
        return
    if watch.before > 0:
        watch.before -= 1
        return
    watch.reached()


@functools.cache
def _install() -> None:
    # A hook stays for the life of the process; without a watch it looks up one key and returns.
    sys.addaudithook(_hook)


@contextlib.contextmanager
def _watching(watch: _Watch) -> Iterator[_Watch]:
    _install()
    _watches[threading.get_ident()] = watch
    try:
        yield watch
    finally:
        del _watches[threading.get_ident()]


def crash(work: Callable[[], None], folder: str, *, before: int) -> bool:
    """
    Do `work`, but end it instead of its operation number `before` (from 0) below `folder`; whether it was ended.

    From then on none of its operations is done, those of its clean-up neither.
    """

    def end() -> None:
        raise Crashed

    with _watching(_Watch(folder, before, end)):
        try:
            work()
        except Crashed:
            return True
    return False


class Stalled:
    """
    `work` in a thread, stopped before its operation number `before` (from 0) below `folder`.

    Owns: the thread; `finish` lets it go on and waits for its end.
    """

    def __init__(self, work: Callable[[], None], folder: str, *, before: int) -> None:
        self._stopped, self._go_on, self._ended = threading.Event(), threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(work, folder, before), daemon=True)
        self._thread.start()
        self._either()

    def _either(self) -> None:
        assert self._stopped.wait(Deadline.REPLY.s), "the work neither ended nor came to where it is to stop"

    def _run(self, work: Callable[[], None], folder: str, before: int) -> None:
        def stop() -> None:
            if not self._stopped.is_set():
                self._stopped.set()
                assert self._go_on.wait(Deadline.SCRIPT.s)

        try:
            with _watching(_Watch(folder, before, stop)):
                work()
        except Exception as err:
            self.error = err
        finally:
            self._ended.set()
            self._stopped.set()

    @property
    def ended(self) -> bool:
        """Whether the work came to its end before the place where it was to stop."""
        return self._ended.is_set()

    def finish(self) -> None:
        """Let the work go on, and wait for its end. Blocks: within Deadline.REPLY."""
        self._go_on.set()
        self._thread.join(Deadline.REPLY.s)
        assert not self._thread.is_alive(), "the work did not end"
