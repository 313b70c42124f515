"""
The executor process: one thread receives requests and answers pings, one runs the requests, and one sends signals to all pods.

    supervisor                            |  this process
    ------------------------------------- | -----------------------------------------------
    requests: `channel`               --> |  reader (main thread) --> queue --> runner thread
    answers, events                   <-- |  <-----------------------------------+
    EOF                               --> |  ends at once, because its supervisor is gone

Called from: `python -m pillion_sidecar.executor.worker FD` by `supervisor.executor_process`. A failed request is answered with the failure, and
the loop continues. Only the supervisor ends this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from pillion.errors import ErrorDocument, InternalError, PillionError, RemoteFailure, SidecarError
from pillion.wire import messages, names, policy
from pillion.wire.message import Message, Request
from pillion.wire.save_messages import Destination, NamedWriter
from pillion_sidecar import channel, log
from pillion_sidecar.arena import image
from pillion_sidecar.executor import checked, garbage
from pillion_sidecar.executor import priority as priority_module
from pillion_sidecar.executor import session as session_module
from pillion_sidecar.executor.exchange import broadcast
from pillion_sidecar.executor.exchange.watchdog import SessionLeft, Watchdog
from pillion_sidecar.executor.load import request as request_module
from pillion_sidecar.executor.load import restore
from pillion_sidecar.executor.save import commit, hold, persist, rescue, upload
from pillion_sidecar.executor.session import with_failover
from pillion_sidecar.session.record import Counts
from pillion_sidecar.session.state import State
from pillion_sidecar.waits import Wait

_log = logging.getLogger(__name__)
R = TypeVar("R", bound=Request[Any])

QUEUE_LIMIT: Final = 64
"""Maximum waiting requests. The supervisor sends one at a time, so this bounds only a defect."""


class Worker:
    """The threads and the state of the executor process. See the module."""

    def __init__(self, sock: socket.socket, broken: Exception | None = None) -> None:
        self._sock = sock
        self._broken = broken
        self._garbage = garbage.Garbage(os.environ)
        self._priority = priority_module.Priority()
        self._send_lock = threading.Lock()
        self._requests: queue.Queue[Request[Any]] = queue.Queue(QUEUE_LIMIT)
        self._outgoing: queue.Queue[channel.Signal] = queue.Queue(QUEUE_LIMIT)
        self._uploads: queue.Queue[channel.Upload] = queue.Queue(QUEUE_LIMIT)
        self._opening: channel.Open | None = None
        """What the session was opened with."""
        self._beside: session_module.Context | None = None
        """Context of the uploads of the session `_beside_of`; None: there was none yet."""
        self._beside_of = ""
        self._beside_watch: Watchdog | None = None
        self._checked = checked.Checked()
        self._context: session_module.Context | None = None
        self._watch: Watchdog | None = None
        """Watchdog of the session that is open or being opened."""
        self._over = ""
        """The session that ended last. Its work leaves its waits for other pods."""
        self._state: State | None = None
        """Newest state of the session's trainers. None: none was sent since the opening began."""
        self._signals: broadcast.Signals | None = None
        self._store: channel.StoreAt | None = None
        """Address of the store of `_context`'s session."""
        self._writer: NamedWriter | None = None
        """The policy's storage.writer, for saves that name no destination."""
        self._at_once: Mapping[type[Message], Callable[[Any], None]] = {
            channel.Ping: lambda ping: self._answer(ping, channel.Pong(wait=self._wait())),
            channel.Over: self._end_session,
            channel.Show: self._show,
            channel.Signal: lambda signal: self._queue(self._outgoing, signal),
            channel.Upload: lambda upload: self._queue(self._uploads, upload),
        }
        """Handlers of requests that do not wait for the running operation."""
        self._operations: Mapping[type[Message], Callable[[Any], channel.Answer]] = {
            channel.Warm: self._warm,
            channel.Open: self._open,
            channel.Persist: self._persist_beside_training,
            channel.Load: self._load,
            channel.Withdraw: self._withdraw,
            channel.Rescue: self._rescue,
            channel.Retain: self._retain,
            channel.Verify: self._verify,
        }

    def serve(self) -> None:
        """Serve until the supervisor closes the channel. Blocks: for the life of the process."""
        threading.Thread(target=self._run, name="pillion-run", daemon=True).start()
        # A separate thread: a signal is about the next save, so it must not wait for the running one, and the store may not answer.
        threading.Thread(target=self._tell, name="pillion-tell", daemon=True).start()
        # A separate thread: an upload takes minutes, and the next save is to be on the local disk meanwhile.
        threading.Thread(target=self._upload_all, name="pillion-upload", daemon=True).start()
        decoder = messages.Decoder()
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                for message in messages.receive(self._sock, decoder):
                    self._take(message)

    def _take(self, body: messages.Message) -> None:
        self._priority.settle()
        try:
            request = channel.read_request(body)
        except messages.BadFrame as err:
            self._send({**_failed(InternalError(str(err))).to_document(), "id": body.get("id", 0)})
            return
        if type(request) in self._at_once:
            self._at_once[type(request)](request)
        else:
            self._queue(self._requests, request)

    def _queue(self, waiting: queue.Queue[R], request: R) -> None:
        try:
            waiting.put_nowait(request)
        except queue.Full:
            text = f"{QUEUE_LIMIT} messages wait before this one: the store answers none of them"
            self._answer(request, _failed(SidecarError(text)))

    def _end_session(self, request: channel.Over) -> None:
        self._over = request.session
        self._answer(request, channel.Done())

    def _show(self, request: channel.Show) -> None:
        """Write the state of the session's trainers to its record on the root, which other trainings read."""
        lease = self._context.lease if self._context is not None else None
        self._state = request.state
        self._priority.settle(is_urgent=request.state is not State.TRAINING)
        if lease is None:
            self._answer(request, channel.Done())
        else:
            lease.change(self._state, lambda: self._answer(request, channel.Done()))

    def _answer(self, request: Request[Any], answer: channel.Answer) -> None:
        self._send({**answer.to_document(), "id": request.id})

    def _say(self, event: Message) -> None:
        self._send(event.to_document())

    def _send(self, message: Mapping[str, object]) -> None:
        frame = messages.encode(message)
        with self._send_lock, contextlib.suppress(OSError):
            self._sock.sendall(frame)

    def _run(self) -> None:
        while True:
            request = self._requests.get()
            try:
                if self._broken is not None:
                    raise self._broken
                answer = self._operations[type(request)](request)
                self._answer(request, dataclasses.replace(answer, counts=self._counts()))
                if isinstance(request, channel.Persist):
                    self._garbage.saved()
            except BaseException as raised:  # a boundary: every failure is answered, even a sys.exit in foreign code, and the loop continues
                err = SidecarError(str(raised)) if isinstance(raised, SessionLeft) else raised
                _log.warning("%s failed: %s", request.type, err, exc_info=not isinstance(err, PillionError))
                self._answer(request, _failed(err, self._counts()))
            finally:
                if self._watch is not None:
                    self._watch.idle()

    def _store_lost(self, session: str) -> None:
        self._say(channel.StoreLost(session=session))

    def _wait(self) -> Wait | None:
        waits = [watch.report() for watch in (self._watch, self._beside_watch) if watch is not None]
        return max(filter(None, waits), key=lambda wait: wait.for_s - wait.bound_s, default=None)

    def _counts(self) -> Counts | None:
        """Return the counts from which a successor of this process continues."""
        context = self._context
        if context is None:
            return None
        return Counts(loads=context.loads, epoch=context.epoch, rescues=context.rescues, store_lost=context.store_lost)

    def _tell(self) -> None:
        while True:
            request = self._outgoing.get()
            context, between = self._context, self._signals
            try:
                if context is None or between is None:
                    raise InternalError("the executor has no session with other pods")
                context.watch.store("a message to all pods")
                try:
                    between.send(request.message)
                finally:
                    context.watch.idle()
                self._answer(request, channel.Done())
            except Exception as err:  # a boundary: the sender is answered, whatever it was
                self._answer(request, _failed(err))

    def _upload_all(self) -> None:
        while True:
            request = self._uploads.get()
            try:
                self._answer(request, self._upload(request))
            except BaseException as raised:  # a boundary, as in `_run`
                err = SidecarError(str(raised)) if isinstance(raised, SessionLeft) else raised
                _log.warning("%s failed: %s", request.type, err, exc_info=not isinstance(err, PillionError))
                self._answer(request, _failed(err))
            finally:
                if self._beside_watch is not None:
                    self._beside_watch.idle()

    def _upload(self, request: channel.Upload) -> channel.Persisted:
        context, opening = self._context, self._opening
        if context is None or opening is None or opening.session != request.session:
            raise SidecarError(f"session {request.session} is not open in this executor")
        if self._beside is None or self._beside_of != request.session:
            watch = self._watchdog(opening)
            self._beside_watch = watch
            if self._beside is not None:
                self._beside.close()
            self._beside, self._beside_of = session_module.open_beside(context, opening, watch), request.session
        beside = self._beside
        with self._priority.beside_training():
            return with_failover(beside, lambda: upload.upload(beside, request, self._say))

    # --- operations (runner thread) ------------------------------------------------------------------------------------

    def _warm(self, request: channel.Warm) -> channel.Done:
        """Import the modules of the session that need torch. This takes seconds, and serves later sessions as well."""
        for module in request.modules:
            importlib.import_module(f"{__package__}.{module}")
        return channel.Done()

    def _open(self, request: channel.Open) -> channel.Opened:
        if self._signals is not None:
            self._signals.close()
        earlier = self._context.segments if self._context is not None else {}
        if self._context is not None:
            self._leave(self._context, request)
        self._context = self._signals = None
        self._watch = self._watchdog(request)
        self._state = None
        self._priority.settle(is_urgent=False)
        self._context = session_module.open_context(request, self._watch, self._say, earlier)
        self._context.checked = self._checked
        if self._state is not None and self._context.lease is not None:
            # The state changed while the session was being opened.
            self._context.lease.change(self._state, lambda: None)
        self._store, self._opening = request.store, request
        named = policy.parse(request.policy, embedded=True).storage.writer
        self._writer = None if named is None else NamedWriter(name=named.name, arguments=named.arguments)
        if self._context.signal_store is not None:
            self._context.watch.store("messages to all pods")
            self._signals = broadcast.Signals(
                self._context.signal_store,
                lambda number, message: self._say(channel.Heard(number=number, message=message)),
                pods=[pod[0] for pod in self._context.pods],
                first_rank=self._context.first_rank,
                seen=request.signals,
                on_lost=functools.partial(self._store_lost, self._context.session),
            )
        copies = hold.adopt(self._context)
        if copies:
            self._say(channel.CopiesFound(session=request.session, copies=tuple(copies)))
        return channel.Opened(
            generation=self._context.generation,
            store=self._context.store_address,
            signals=self._signals.begun if self._signals is not None else None,
            run={"journal": self._context.run, "seen_ns": self._context.seen_before_ns},
        )

    def _watchdog(self, opening: channel.Open) -> Watchdog:
        return Watchdog(
            storage_timeout_s=opening.storage_timeout_s,
            store_timeout_s=opening.store_timeout_s,
            is_over=lambda: self._over == opening.session,
        )

    def _leave(self, context: session_module.Context, successor: channel.Open) -> None:
        """Close a session that is over. Delete its keys from the store, if the store continues (as torchrun's agent's does)."""
        for segment in context.segments.values():
            segment.close()
        if context.lease is not None:
            context.lease.close()
        # Trainers that restart as a job of one pod use no store, and their previous store may continue.
        is_restart = successor.session != context.session and successor.store in (None, self._store)
        if is_restart and self._store is not None and context.coordinator and not context.store_lost:
            # The store's errors are RuntimeErrors. After one, some two dozen small keys stay in the store.
            with contextlib.suppress(RuntimeError, PillionError):
                context.exchange.forget(context.phases_left())
                context.exchange.unpublish(context.published_left())
                if self._signals is not None:
                    context.watch.store("forget messages to all pods")
                    self._signals.forget()
        context.close()

    def _opened(self) -> session_module.Context:
        if self._context is None:
            raise InternalError("the executor has no session")
        return self._context

    def _persist_beside_training(self, wanted: channel.Persist) -> channel.Persisted:
        if wanted.rescued:
            return self._persist(wanted)
        with self._priority.beside_training():
            return self._persist(wanted)

    def _persist(self, wanted: channel.Persist) -> channel.Persisted:
        context = self._opened()
        context.retention = wanted.retention
        self._checked.forget()
        # Retention applies to all saves into the root, even with the policy's own writer.
        retained = wanted.persist and wanted.destination is None
        if retained and self._writer is not None:
            path = str(context.step_folder(wanted.step))
            wanted = dataclasses.replace(wanted, destination=Destination(path=path, writer=self._writer))
        with_failover(context, lambda: persist.check_destination(context, wanted))
        if wanted.destination is not None and wanted.destination.writer is not None and wanted.persist:
            from pillion_sidecar.executor.save import dcp_writer  # torch.distributed.checkpoint

            return with_failover(context, lambda: dcp_writer.persist(context, wanted, retained=retained))
        outcome = with_failover(context, lambda: persist.persist(context, wanted))
        if not wanted.persist and not outcome.held:
            self._digest(wanted)
        return outcome

    def _digest(self, wanted: channel.Persist) -> None:
        """Write archive heads and digests into a slot of every local rank, so that a restore from the arena can be verified."""
        context = self._opened()
        for segment in context.segments.values():
            slot_image = context.reader.read(segment, wanted.slot, step=wanted.step)
            image.digest_all(image.frame(slot_image))

    def _withdraw(self, request: channel.Withdraw) -> channel.Done:
        context, error = self._opened(), ErrorDocument.from_document(request.error)
        kind = {"persist": request.persist, "rescued": request.rescued}
        with_failover(context, lambda: persist.withdraw(context, request.step, error, **kind))
        return channel.Done()

    def _rescue(self, request: channel.Rescue) -> channel.Agreed:
        context = self._opened()
        return with_failover(context, lambda: rescue.agree(context, request))

    def _retain(self, request: channel.Retain) -> channel.Retained:
        context = self._opened()
        context.retention = request.retention
        more = commit.retain(context, request.current, request.slice_s)
        return channel.Retained(more=more, over_quota=context.known.over_quota)

    def _load(self, request: channel.Load) -> channel.Loaded:
        context, wanted = self._opened(), request_module.Request.from_message(request)
        # Counted once, even if the load fails, because the phases of the exchange have this number.
        context.loads += 1
        context.known.forget_all()  # a load may finish interrupted commits
        try:
            with self._priority.awaited():
                return with_failover(context, lambda: restore.load(context, wanted, self._say))
        finally:
            if not wanted.find:
                self._checked.forget()

    def _verify(self, request: channel.Verify) -> channel.Verified:
        context = self._opened()
        if context.session != request.session:
            return channel.Verified(whole=False)
        images = [context.reader.read(each, request.slot, step=request.step) for each in context.segments.values()]
        return channel.Verified(whole=self._checked.verify(images, interrupted=lambda: not self._requests.empty()))


def _failed(err: BaseException, counts: Counts | None = None) -> channel.Failed:
    return channel.Failed(error=_document(err).to_document(), counts=counts)


def _document(err: BaseException) -> ErrorDocument:
    if isinstance(err, PillionError):
        return ErrorDocument.from_exception(err)
    text = "".join(traceback.format_exception(err))
    failure = RemoteFailure.from_exception(err, pid=os.getpid(), traceback_text=text)
    return ErrorDocument("SaveError", "the executor failed", {-1: failure})


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only the supervisor ends this process. A SIGTERM to the whole process group must not end a drain early.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.configure(sys.argv[2])
    priority_module.begin()
    broken = None
    # Appended, so that a module of the trainer never replaces one that the executor needs.
    more = os.environ.get(names.ENV_IMPORT_PATH, "").split(os.pathsep)
    sys.path += [each for each in more if each and each not in sys.path]
    try:
        for name in filter(None, os.environ.get("PILLION_PRELOAD", "").split(",")):
            importlib.import_module(name)
    except (
        Exception
    ) as err:  # a boundary: the first request is answered with this error, and the supervisor starts a new process
        broken = err
    sock = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker(sock, broken)
    worker.serve()
    # Without waiting for daemon threads, which may be in a write that never returns. The supervisor is gone.
    os._exit(0)


if __name__ == "__main__":
    main()
