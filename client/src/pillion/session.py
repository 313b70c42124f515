"""
This rank's session with its sidecar: finds or starts the sidecar, says hello, and reconnects if the sidecar went away.

Called from: `Checkpointer`, `pillion.dcp`. Owns: the connection, the mapping of the segment, and the handles of saves in flight.

    start --> connect --> hello/welcome --> map the segment --> saves and loads ...
                 ^                                                   | EOF
                 +------------ reconnect, in the background <--------+   (handles in flight fail; training continues)
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import Any, Final, TypeVar

from pillion import callbacks, connection, embedded, progress, staging, stopping
from pillion.errors import ErrorDocument, PillionError, SidecarUnavailable, StagingError, UsageError
from pillion.group import Group
from pillion.handle import Checkpoint, SaveHandle, log_lost
from pillion.wire import control, events, names, policy, save_messages
from pillion.wire.message import Message, Request

_log = logging.getLogger(__name__)
A = TypeVar("A")

CONNECT_TIMEOUT_S: Final = 60.0
"""Timeout for a sidecar that accepts connections. Other local ranks wait this long for local rank 0 to start it."""
HELLO_TIMEOUT_S: Final = 1830.0
"""Timeout for the answer to the hello. The sidecar first finishes the saves that the previous trainers left in its arena, which may take its
persist_timeout_s (1800 s). A shorter timeout would end a restart whose last save is large."""
REQUEST_TIMEOUT_S: Final = 30.0
"""Timeout for answers that need no I/O on storage."""
SILENT_TIMEOUT_S: Final = 1.0
"""Timeout for the answer to a claim, if the sidecar did not answer the previous claim and has sent nothing since. So a hung sidecar holds
up training for 1 s a save, instead of REQUEST_TIMEOUT_S."""
RESERVE_TIMEOUT_S: Final = 600.0
"""Timeout for allocating and touching the arena: 600 s are 600 GiB on the slowest machine measured."""
HELLO_PAUSE_S: Final = 0.1
"""Pause before the second hello, if the sidecar went away without an answer. Each further pause is twice as long. A sidecar whose previous
run has just closed is gone after 0.1 s."""
MAX_HELLO_PAUSE_S: Final = 2.0
"""Maximum pause between two hellos. A sidecar that dies at each hello must not be started hundreds of times."""
OVERLAP_WAIT_S: Final = 1800.0
"""Timeout for a free slot under `overlap: Wait`. A storage that has not freed a slot in half an hour is reported as the save's failure."""
MAX_OWED: Final = 64
"""Maximum abandoned steps that are kept for the sidecar's successor. Fewer saves are in flight at once."""
RECONNECT_PAUSE_S: Final = 0.05
"""Pause before the first reconnect. Each further pause is twice as long. Nothing is saved until the sidecar is back."""
MAX_RECONNECT_PAUSE_S: Final = 8.0
"""Maximum pause of the first RECONNECT_SLOW_AFTER attempts. A restarted container is back in seconds, unless it crashes repeatedly."""
RECONNECT_SLOW_AFTER: Final = 20
"""Number of attempts, about two minutes, after which the pause is RECONNECT_PAUSE_SLOW_S."""
RECONNECT_PAUSE_SLOW_S: Final = 30.0
"""Pause of later attempts, until the session is closed. A job of weeks must get its checkpoints back, even if its sidecar returns only
after an hour."""


class Session:
    """
    One rank's session.

    Args:
        group: this rank and its peers.
        root: absolute path of the checkpoints' directory.
        policy_document: policy of an embedded run, as a document or the path of a file. None in a pod.
        key: text from which the runtime directory of an embedded run is derived (the root, or a random id).
        store_mode: the store that the sidecars of several pods use. None in a single pod.
        on_event: called in the reader thread for events that concern no handle (announced, declined, policy changed).
        environ: the environment.

    Blocks: up to CONNECT_TIMEOUT_S, and after a crash up to HELLO_TIMEOUT_S.

    Raises:
        SidecarUnavailable: there is no sidecar, and none could be started.
        ProtocolMismatch: the sidecar speaks another version of the protocol.
        SettingsError: the sidecar refuses the root or the policy.
    """

    def __init__(
        self,
        group: Group,
        *,
        root: str,
        policy_document: Mapping[str, object] | str | None,
        key: str,
        store_mode: control.MeetingStore | None,
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
        self._owed: deque[save_messages.Abandon] = deque(maxlen=MAX_OWED)
        """Messages that could not be sent. The sidecar's successor gets them."""
        self._closed = threading.Event()
        self._greeted = False
        self._held_back: list[Message] | None = []
        """Events that came before `listen`. None after it."""
        self.mapping: staging.SegmentMapping | None = None
        self.welcome: control.Welcome
        self._events: Mapping[type[Message], Callable[[Any], None]] = {
            events.Committed: self._committed,
            events.Held: self._held,
            events.Persisting: self._persisting,
            events.SaveFailed: self._save_failed,
            events.Notice: lambda notice: _log.log(
                logging.INFO if notice.routine else logging.WARNING, "pillion sidecar: %s", notice.text
            ),
            events.End: self._end,
        }
        self._connection = self._used = self._greet(CONNECT_TIMEOUT_S)
        """`_used`: the connection of the newest `stream`."""
        self.policy = policy.parse(group.policy or self.welcome.policy, embedded=True)

    # --- connecting ------------------------------------------------------------------------------------------------

    def _greet(self, timeout_s: float) -> connection.Connection:
        deadline, pause_s = time.monotonic() + timeout_s, HELLO_PAUSE_S
        for attempt in itertools.count(1):
            link = self._connect(deadline)
            why = "the sidecar closed the connection"
            try:
                self._hello(link)
                with self._lock:
                    if not link.lost:
                        # Set together under the lock. A loss from now on starts `_reconnect`, which begins by closing this connection.
                        self._greeted, self._connection = True, link
                        return link
            except SidecarUnavailable as err:
                # A sidecar that was ending (the previous run has just closed) broke the connection. Its successor will answer.
                if not link.lost:
                    link.close()
                    raise
                why = str(err)
            except BaseException:
                link.close()
                raise
            link.close()
            why = f"{why}, and did not answer the hello ({attempt} so far){self._log_hint}"
            if attempt > 1:
                _log.warning("pillion: %s", why)
            if time.monotonic() > deadline or self._closed.wait(pause_s):
                raise SidecarUnavailable(why)
            pause_s = min(pause_s * 2, MAX_HELLO_PAUSE_S)
        raise AssertionError("the count never ends")

    @property
    def _log_hint(self) -> str:
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
                    # In a pod, trainer and sidecar may be different users. No other pod has the volume.
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
        segment_path = self.welcome.segment
        # A sidecar that could not adopt the segment has created a new file. Nobody would read the old mapping.
        if self.mapping is None or self.mapping.inode != os.stat(segment_path).st_ino:
            before, self.mapping = self.mapping, staging.SegmentMapping(segment_path)
            if before is not None:
                before.close()

    def _on_lost(self, reason: str) -> None:
        with self._lock:
            if not self._greeted:
                return  # `_greet` sees the loss, and tries again
        error = SidecarUnavailable(
            f"{reason}{self._log_hint}; sealed saves stay in the arena, and the sidecar's successor persists them"
        )
        _log.warning("pillion: %s", error)
        self._fail_all(error)
        if self._closed.is_set():
            return
        try:
            threading.Thread(target=self._reconnect, name="pillion-reconnect", daemon=True).start()
        except RuntimeError:  # no thread can start; the reader thread, which runs this, has nothing else to do
            self._reconnect()

    def _reconnect(self) -> None:
        """Connect to the sidecar's successor. Try until the session is closed, because nothing is saved without a sidecar."""
        pause_s = RECONNECT_PAUSE_S
        for attempt in itertools.count(1):
            if self._closed.wait(pause_s):
                return
            pause_s = (
                min(pause_s * 2, MAX_RECONNECT_PAUSE_S) if attempt < RECONNECT_SLOW_AFTER else RECONNECT_PAUSE_SLOW_S
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
            ) as err:  # a boundary: a lack of descriptors, processes or memory may be over at the next attempt
                self._log_absence(attempt, err)

    @staticmethod
    def _log_absence(attempt: int, err: Exception) -> None:
        if attempt < RECONNECT_SLOW_AFTER:
            _log.warning("pillion: no sidecar yet (attempt %d): %s", attempt, err)
        elif attempt == RECONNECT_SLOW_AFTER:
            _log.error(
                "pillion: no sidecar after %d attempts: %s; saves fail until one is back; trying again every %.0f s",
                attempt,
                err,
                RECONNECT_PAUSE_SLOW_S,
            )

    def returned(self, timeout_s: float) -> bool:
        """
        Return whether the connection of the last `stream` was lost and a new one exists.

        Blocks: up to `timeout_s` for the new connection. Not at all if no connection is lost.
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
        if handle is None:
            self._on_other_event(event)
            return
        found = Checkpoint(step=event.step, path=event.path or None, size_bytes=event.size_bytes)
        handle.resolve(dataclasses.replace(found, persist_s=event.persist_s, commit_s=event.commit_s))

    def _end(self, _: events.End) -> None:
        if self.injected:
            stopping.stop()

    def _held(self, event: events.Held) -> None:
        with self._lock:
            handle = self.handles.get(event.step)
        if handle is not None:
            handle.resolve_held()

    def _persisting(self, event: events.Persisting) -> None:
        """Log how far a save is, if the script waits for it: in `result`, at the end, or for a slot. Otherwise the sidecar's log has it."""
        waits = self._closed.is_set() or any(handle.awaited for handle in self.pending())
        if waits and self.group.local_rank == 0:
            how_far = progress.text(event.written_bytes, event.size_bytes, event.elapsed_s)
            _log.warning("pillion: waiting for the save of step %d: %s", event.step, how_far)

    def _save_failed(self, event: events.SaveFailed) -> None:
        error = ErrorDocument.from_document(event.error).to_exception(step=event.step)
        handle = self._take(event.step)
        if handle is not None:
            log_lost(event.step, error)
            handle.incomplete = event.more
            handle.fail(error)

    def listen(self) -> None:
        """
        Deliver events to `on_event` from now on, beginning with those that came before this call.

        Called from: the opener of the session, once it can handle events.
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
        """Resolve the handle by later events of its step."""
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
        """Whether this process is a forked child of the process that opened the session."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """
        Check that this process opened the session. Every use of a session begins with this check.

        Raises:
            UsageError: the parent of this process opened it.
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
        Allocate and touch at least `room_bytes` for every slot of this rank. Return the capacity of each slot, bytes.

        Blocks: up to RESERVE_TIMEOUT_S.

        Raises:
            ArenaExhausted: the policy's limit is reached, or the tmpfs is full.
            SidecarUnavailable: no answer.
        """
        return list(self._link.request(save_messages.Reserve(room_bytes=room_bytes), RESERVE_TIMEOUT_S).capacities)

    def claim(self, claim: save_messages.Claim, on_wait: Callable[[], object] = lambda: None) -> staging.Grant:
        """
        Return a slot for a save.

        Args:
            claim: what is to be saved.
            on_wait: called once, if the sidecar reports that no slot is free yet.

        Blocks: for one round trip. Under `overlap: Wait` for a free slot, up to OVERLAP_WAIT_S. If the sidecar hangs, up to
            REQUEST_TIMEOUT_S with a warning after connection.SILENCE_WARNING_S, and up to SILENT_TIMEOUT_S in later calls.

        Raises:
            SaveSkipped: the policy's `overlap` dropped the save.
            StagingError: under `overlap: Wait` no slot became free in time.
            ArenaExhausted: the slot cannot grow to this size.
            SidecarUnavailable: no answer.
        """
        # Read in this order. While the connection lives, the mapping belongs to the same sidecar.
        link, mapping = self._link, self.mapping
        if mapping is None:
            raise StagingError("the session has no arena")
        # A waiting claim gets a notice every few seconds. A sidecar without notices hangs, and training does not wait for it.
        message_timeout_s = REQUEST_TIMEOUT_S if self.welcome.notices else OVERLAP_WAIT_S
        if link.silent:
            message_timeout_s = min(message_timeout_s, SILENT_TIMEOUT_S)
        deadline = time.monotonic() + OVERLAP_WAIT_S
        waited = False
        with contextlib.closing(link.stream(claim, message_timeout_s, warns=True)) as answers:
            for answer in answers:
                if isinstance(answer, save_messages.Claimed):
                    return staging.Grant(answer.slot, answer.capacity_bytes, claim.room_bytes, mapping)
                if not waited:
                    waited = True
                    on_wait()
                if time.monotonic() > deadline:
                    raise StagingError(f"no slot was free within {OVERLAP_WAIT_S:.0f} s", step=claim.step)
        raise AssertionError("the stream of answers never ends")

    def sealed(self, step: int, *, stall_s: float) -> None:
        """Report to the sidecar that this rank has sealed its slot, which held up training for `stall_s` (0 for an overlapped save)."""
        self._link.send(save_messages.Sealed(step=step, stall_s=stall_s))

    def abandon(self, step: int, error: ErrorDocument, *, persist: bool, gathers: bool = False) -> None:
        """
        Report to the sidecar that this rank will not seal `step`, because the other pods wait for this pod's part of the checkpoint.

        If the sidecar is gone, its successor gets the message. `persist` and `gathers`: see `wire.save_messages.Abandon`. Never raises,
        because the save has already failed.
        """
        if self.inherited:
            return
        message = save_messages.Abandon(step=step, persist=persist, error=error.to_document(), gathers=gathers)
        try:
            self._connection.send(message)
        except SidecarUnavailable:
            self._owed.append(message)

    def send(self, message: Message) -> None:
        """Send a message that needs no answer. It is lost if the sidecar is gone."""
        with contextlib.suppress(SidecarUnavailable):
            self._link.send(message)

    def request(self, request: Request[A], timeout_s: float) -> A:
        return self._link.request(request, timeout_s)

    def stream(self, request: Request[A], timeout_s: float) -> Generator[A]:
        self._used = self._link
        return self._used.stream(request, timeout_s)

    def close(self, *, drain_s: float, clean: bool) -> None:
        """
        End the session, after the sidecar has finished the saves in flight. Handles that are still pending fail.

        In a forked child this does nothing, because the session belongs to the parent.

        Args:
            drain_s: timeout for the saves in flight, seconds.
            clean: False if an exception ends the trainer. Then an embedded sidecar keeps the arena for a restart.

        Blocks: up to `drain_s`, the connection's own timeouts, and callbacks.DRAIN_S.

        Raises:
            SidecarUnavailable: the sidecar did not finish in time.
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
