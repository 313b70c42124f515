"""
This rank's standing with its sidecar: found or started, greeted, and found again when it went away.

Called from: `Checkpointer`, `pillion.dcp`. Owns: the connection, the mapping of the segment, and the handles of saves in flight.

    start --> connect --> hello/welcome --> map the segment --> saves and loads ...
                 ^                                                   | EOF
                 +------------ reconnect, in the background <--------+   (handles in flight fail; training goes on)
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pillion import callbacks, connection, embedded, staging, stopping
from pillion.errors import ErrorDocument, PillionError, SidecarUnavailable, StagingError, UsageError
from pillion.group import Group
from pillion.handle import Checkpoint, SaveHandle, log_lost
from pillion.wire import control, events, names, policy, save_messages
from pillion.wire.message import Message, Request

_log = logging.getLogger(__name__)
A = TypeVar("A")

CONNECT_TIMEOUT_S: Final = 60.0
"""Bound for the sidecar to be there. Other local ranks wait this long for local rank 0 to start it."""
HELLO_TIMEOUT_S: Final = 1830.0
"""Bound for the answer to the hello: the sidecar first finishes the saves that the trainers before left in its arena, within its
own persist_timeout_s (1800 s). A shorter one would end a restart whose last save is large."""
REQUEST_TIMEOUT_S: Final = 30.0
"""Bound for answers that take no I/O on storage (reserve: it allocates and touches memory, about 1 s a GiB)."""
SILENT_TIMEOUT_S: Final = 1.0
"""Bound for the answer to a claim of a sidecar that was silent at the one before and has said nothing since: it costs training this much a
save, and not REQUEST_TIMEOUT_S each time."""
RESERVE_TIMEOUT_S: Final = 600.0
"""Bound for the arena to be allocated and touched: 600 s are 600 GiB on the slowest machine measured."""
HELLO_PAUSE_S: Final = 0.1
HELLO_PAUSE_MOST_S: Final = 2.0
"""Pause before another hello where the sidecar went away instead of an answer, doubled from the first to the second: a run before that has
just closed is gone in 0.1 s, and one that dies of each hello is not to be started hundreds of times."""
OVERLAP_WAIT_S: Final = 1800.0
"""Bound for `overlap: Wait`: a save that storage did not take in half an hour is reported, not waited for."""
OWED_MOST: Final = 64
"""Steps given up while no sidecar was there, to be told to its successor; more than are on their way at once."""
RECONNECT_PAUSE_S: Final = 0.05
"""Pause before the first reconnect, doubled from then on: until the sidecar is back nothing is saved."""
RECONNECT_PAUSE_MOST_S: Final = 8.0
"""A restarted container is back in seconds, one that crashes again and again later."""
RECONNECT_SLOW_AFTER: Final = 20
RECONNECT_PAUSE_SLOW_S: Final = 30.0
"""After that many attempts, two minutes, the pause is this long, for as long as the session is open: a job of weeks whose sidecar comes
back after an hour must not go on without checkpoints."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot that this rank may fill for one step."""

    slot: int
    capacity_bytes: int
    room_bytes: int
    """How much of it was asked for."""
    mapping: staging.SegmentMapping
    """What the slot is one of; a sidecar that is replaced may have another."""


class Session:
    """
    One rank's session.

    Args:
        group: who the ranks are.
        root: where checkpoints go; absolute.
        policy_document: the policy of an embedded run (a document, or a file's path); None in a pod.
        key: what names the runtime directory of an embedded run (the root, or a nonce).
        store_mode: ``prefix`` or ``own``; which store the sidecars of several pods meet in.
        on_event: called in the reader thread for events that concern no handle (announced, declined, draining).

    Blocks: up to CONNECT_TIMEOUT_S, and HELLO_TIMEOUT_S after a crash.

    Raises:
        SidecarUnavailable, ProtocolMismatch, SettingsError.
    """

    def __init__(
        self,
        group: Group,
        *,
        root: str,
        policy_document: Mapping[str, object] | str | None,
        key: str,
        store_mode: str | None,
        on_event: Callable[[Message], None],
        environ: Mapping[str, str],
    ) -> None:
        self._pid = os.getpid()
        self.group = group
        self.root = root
        self._policy_document = policy_document
        self._store_mode = store_mode
        self._on_other_event = on_event
        self._environ = environ
        self.injected = names.ENV_RUNTIME_DIR in environ
        self.runtime_dir = embedded.runtime_directory(key, environ)
        self.handles: dict[int, SaveHandle] = {}
        self._lock = threading.Lock()
        self._owed: deque[save_messages.Abandon] = deque(maxlen=OWED_MOST)
        self._closed = threading.Event()
        self._greeted = False
        self._held_back: list[Message] | None = []
        """Events that came before `listen`; None from then on."""
        self.mapping: staging.SegmentMapping | None = None
        self.welcome: control.Welcome
        self._events: Mapping[type[Message], Callable[[Any], None]] = {
            events.Committed: self._committed,
            events.SaveFailed: self._save_failed,
            events.Notice: lambda notice: _log.warning("pillion sidecar: %s", notice.text),
            events.End: self._end,
        }
        self._connection = self._used = self._greet(CONNECT_TIMEOUT_S)
        """`_used`: the one that the newest request of several answers went to."""
        self.policy = policy.parse(group.policy or self.welcome.policy, embedded=True)

    # --- being connected -------------------------------------------------------------------------------------------

    def _greet(self, timeout_s: float) -> connection.Connection:
        deadline, pause_s = time.monotonic() + timeout_s, HELLO_PAUSE_S
        for attempt in itertools.count(1):
            link = self._connect(deadline)
            why = "the sidecar closed the connection"
            try:
                self._hello(link)
                with self._lock:
                    if not link.lost:
                        # Both at once: a loss from here on starts a search, which begins by closing this one.
                        self._greeted, self._connection = True, link
                        return link
            except SidecarUnavailable as err:
                # One that was at its end (the run before has just closed) took the connection with it: its successor answers.
                if not link.lost:
                    link.close()
                    raise
                why = str(err)
            except BaseException:
                link.close()
                raise
            link.close()
            why = f"{why}, and did not answer the hello ({attempt} so far){self._its_log}"
            if attempt > 1:
                _log.warning("pillion: %s", why)
            if time.monotonic() > deadline or self._closed.wait(pause_s):
                raise SidecarUnavailable(why)
            pause_s = min(pause_s * 2, HELLO_PAUSE_MOST_S)
        raise AssertionError("the count never ends")

    @property
    def _its_log(self) -> str:
        return "" if self.injected else f" (its log: {embedded.log_path(self.runtime_dir)})"

    def _connect(self, deadline: float) -> connection.Connection:
        self._greeted = False
        path = os.path.join(self.runtime_dir, names.CONTROL_SOCKET)
        while True:
            if not self.injected:
                embedded.require_private(self.runtime_dir)
            try:
                return connection.Connection(
                    path,
                    connect_timeout_s=REQUEST_TIMEOUT_S,
                    on_event=self._on_event,
                    on_lost=self._on_lost,
                    # In a pod trainer and sidecar may be different users; the volume is the pod's alone.
                    peer_uid=None if self.injected else os.getuid(),
                )
            except SidecarUnavailable:
                if not self.injected and self.group.local_rank == 0:
                    embedded.start(self.runtime_dir)
                elif time.monotonic() > deadline:
                    raise
                else:
                    time.sleep(embedded.POLL_S)

    def _hello(self, link: connection.Connection) -> None:
        group = self.group
        self.welcome = link.request(
            control.Hello(
                session=group.session,
                run_id=group.run_id,
                attempt=group.attempt,
                rank=group.rank,
                world_size=group.world_size,
                pods=group.pods,
                placement=group.placement,
                pid=os.getpid(),
                client=os.path.dirname(__file__),
                root=self.root,
                policy=self._policy_document,
                store_mode=self._store_mode,
                store=(group.store.host, group.store.port) if group.store else None,
            ),
            HELLO_TIMEOUT_S,
        )
        theirs = self.welcome.segment
        # A sidecar that could not adopt the segment made a new file: the old mapping would be of nobody's memory.
        if self.mapping is None or self.mapping.inode != os.stat(theirs).st_ino:
            before, self.mapping = self.mapping, staging.SegmentMapping(theirs)
            if before is not None:
                before.close()

    def _on_lost(self, reason: str) -> None:
        with self._lock:
            if not self._greeted:
                return  # whoever greets sees it, and tries again
        error = SidecarUnavailable(
            f"{reason}{self._its_log}; what was sealed stays in the arena, and the sidecar's successor persists it"
        )
        _log.warning("pillion: %s", error)
        self._fail_all(error)
        if self._closed.is_set():
            return
        try:
            threading.Thread(target=self._reconnect, name="pillion-reconnect", daemon=True).start()
        except RuntimeError:  # no more threads: the one that listened has nothing else to do any more
            self._reconnect()

    def _reconnect(self) -> None:
        """Look for the sidecar's successor, for as long as the session is open: without one nothing is saved."""
        pause_s = RECONNECT_PAUSE_S
        for attempt in itertools.count(1):
            if self._closed.wait(pause_s):
                return
            pause_s = (
                min(pause_s * 2, RECONNECT_PAUSE_MOST_S) if attempt < RECONNECT_SLOW_AFTER else RECONNECT_PAUSE_SLOW_S
            )
            try:
                self._connection.close()
                link = self._greet(CONNECT_TIMEOUT_S)
                if self._closed.is_set():
                    link.close()
                    return
                _log.warning("pillion: the sidecar is back (attempt %d)", attempt)
                while self._owed:
                    self.send(self._owed.popleft())
                return
            except (
                Exception
            ) as err:  # a boundary: of descriptors, processes or memory there may be enough again in a moment
                self._log_absence(attempt, err)

    @staticmethod
    def _log_absence(attempt: int, err: Exception) -> None:
        if attempt < RECONNECT_SLOW_AFTER:
            _log.warning("pillion: no sidecar yet (attempt %d): %s", attempt, err)
        elif attempt == RECONNECT_SLOW_AFTER:
            _log.error(
                "pillion: no sidecar after %d attempts: %s; saves fail until one is back, which is looked for every %.0f s from here on",
                attempt,
                err,
                RECONNECT_PAUSE_SLOW_S,
            )

    def returned(self, timeout_s: float) -> bool:
        """
        Whether the sidecar that was asked last was lost and another is there. Blocks: up to `timeout_s`; not at all when it was not lost.
        """
        deadline = time.monotonic() + timeout_s
        was_lost = self._used.lost
        while self._connection.lost:
            if time.monotonic() > deadline or self._closed.wait(embedded.POLL_S):
                return False
        return was_lost

    def _fail_all(self, error: PillionError) -> None:
        with self._lock:
            handles, self.handles = list(self.handles.values()), {}
        for handle in handles:
            handle.fail(error)

    # --- events ----------------------------------------------------------------------------------------------------

    def _on_event(self, event: Message) -> None:
        take = self._events.get(type(event))
        if take is None:
            with self._lock:
                if self._held_back is not None:
                    self._held_back.append(event)
                    return
            take = self._on_other_event
        take(event)

    def _committed(self, event: events.Committed) -> None:
        handle = self._take(event.step)
        if handle is not None:
            handle.resolve(
                Checkpoint(
                    step=event.step,
                    path=event.path,
                    size_bytes=event.size_bytes,
                    persist_s=event.persist_s,
                    commit_s=event.commit_s,
                )
            )

    def _end(self, _: events.End) -> None:
        if self.injected:
            stopping.stop()

    def _save_failed(self, event: events.SaveFailed) -> None:
        error = ErrorDocument.from_document(event.error).to_exception(step=event.step)
        handle = self._take(event.step)
        if handle is not None:
            log_lost(event.step, error)
            handle.incomplete = event.more
            handle.fail(error)

    def listen(self) -> None:
        """
        Take events from here on; first those that came meanwhile, in their order.

        Called from: whoever opened the session, once it can take them.
        """
        while True:
            with self._lock:
                if not self._held_back:
                    self._held_back = None
                    return
                held, self._held_back = self._held_back, []
            for message in held:
                self._on_other_event(message)

    def _take(self, step: int) -> SaveHandle | None:
        with self._lock:
            return self.handles.pop(step, None)

    def track(self, handle: SaveHandle) -> None:
        """Let events of the handle's step resolve it."""
        with self._lock:
            self.handles[handle.step] = handle

    def forget(self, handle: SaveHandle) -> None:
        with self._lock:
            if self.handles.get(handle.step) is handle:
                del self.handles[handle.step]

    def pending(self) -> list[SaveHandle]:
        with self._lock:
            return list(self.handles.values())

    # --- requests --------------------------------------------------------------------------------------------------

    @property
    def inherited(self) -> bool:
        """Whether this process is a forked child of the one whose session it is."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """
        Every use of a session begins here.

        Raises:
            UsageError: it is that of this process's parent.
        """
        if self.inherited:
            raise UsageError(
                f"process {os.getpid()} is a forked child: the Checkpointer belongs to the trainer, process {self._pid},"
                " which alone can save and load with it"
            )

    @property
    def _link(self) -> connection.Connection:
        self.check_process()
        return self._connection

    def reserve(self, room_bytes: int) -> list[int]:
        """
        Have every slot of this rank hold at least `room_bytes`, allocated and touched; the capacities.

        Raises:
            ArenaExhausted: the policy's limit, or the tmpfs, has no room.
        """
        return list(self._link.request(save_messages.Reserve(room_bytes=room_bytes), RESERVE_TIMEOUT_S).capacities)

    def claim(
        self,
        step: int,
        *,
        room_bytes: int,
        persist: bool,
        destination: Mapping[str, Any] | None,
        on_wait: Callable[[], object] = lambda: None,
    ) -> Grant:
        """
        A slot for a save of this step. `on_wait` is called once, when none has become free for some seconds.

        Blocks: under `overlap: Wait` until one is free, up to OVERLAP_WAIT_S; else for one round trip. REQUEST_TIMEOUT_S for a
        sidecar that hangs, with a warning after connection.SILENCE_TOLD_S; SILENT_TIMEOUT_S as long as it stays silent.

        Raises:
            SaveSkipped: the policy's `overlap` dropped it.
            StagingError: under `overlap: Wait` no slot was free within the bound.
            ArenaExhausted, SidecarUnavailable.
        """
        # In this order: as long as the connection lives, the mapping is that of its sidecar.
        link, mapping = self._link, self.mapping
        if mapping is None:
            raise StagingError("the session has no arena")
        claim = save_messages.Claim(
            step=step, room_bytes=room_bytes, persist=persist, destination=destination or None, notices=True
        )
        # One that waits is told so every few seconds: a sidecar that is silent hangs, and training does not wait for it.
        each_s = REQUEST_TIMEOUT_S if self.welcome.notices else OVERLAP_WAIT_S
        if link.silent:
            each_s = min(each_s, SILENT_TIMEOUT_S)
        deadline = time.monotonic() + OVERLAP_WAIT_S
        waited = False
        with contextlib.closing(link.stream(claim, each_s, tells_silence=True)) as answers:
            for answer in answers:
                if isinstance(answer, save_messages.Claimed):
                    return Grant(answer.slot, answer.capacity_bytes, room_bytes, mapping)
                if not waited:
                    waited = True
                    on_wait()
                if time.monotonic() > deadline:
                    raise StagingError(f"no slot was free within {OVERLAP_WAIT_S:.0f} s", step=step)
        raise AssertionError("the stream of answers never ends")

    def sealed(self, step: int, *, stall_s: float) -> None:
        """Tell the sidecar that this rank's slot is whole; `stall_s`: how long that held training up, 0 beside it."""
        self._link.send(save_messages.Sealed(step=step, stall_s=stall_s))

    def abandon(self, step: int, error: ErrorDocument, *, persist: bool, gathers: bool = False) -> None:
        """
        Tell the sidecar that this rank will not seal `step`; its successor, when it is gone: the other pods wait for this one's part.

        Never raises: it is called where a save failed already.
        """
        if self.inherited:
            return
        message = save_messages.Abandon(step=step, persist=persist, error=error.to_document(), gathers=gathers)
        try:
            self._connection.send(message)
        except SidecarUnavailable:
            self._owed.append(message)

    def send(self, message: Message) -> None:
        """Tell the sidecar something that needs no answer; lost when it is gone."""
        with contextlib.suppress(SidecarUnavailable):
            self._link.send(message)

    def request(self, request: Request[A], timeout_s: float) -> A:
        return self._link.request(request, timeout_s)

    def stream(self, request: Request[A], timeout_s: float) -> Generator[A]:
        self._used = self._link
        return self._used.stream(request, timeout_s)

    def close(self, *, drain_s: float, clean: bool) -> None:
        """
        Say goodbye; the sidecar finishes what is in flight.

        Args:
            drain_s: how long it may take.
            clean: False when an exception ends the trainer: an embedded sidecar then keeps the arena for a restart.

        Blocks: up to `drain_s` plus the connection's own bounds, and callbacks.DRAIN_S. Handles that are still pending afterwards fail. In a forked child it
            does nothing: the child has no part in its parent's session.

        Raises:
            SidecarUnavailable: the sidecar did not finish within the bound.
        """
        if self.inherited or self._closed.is_set():
            return
        self._closed.set()
        try:
            if not self._connection.lost:
                self._connection.request(control.Goodbye(drain_s=drain_s, clean=clean), drain_s + REQUEST_TIMEOUT_S)
        finally:
            self._connection.close()
            self._fail_all(SidecarUnavailable("the session was closed before the commit was known"))
            callbacks.drain()
            if self.mapping is not None:
                self.mapping.close()
