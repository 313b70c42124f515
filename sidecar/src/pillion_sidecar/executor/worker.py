"""
The executor's child process: one thread answers pings and takes requests, one runs them, one at a time, and one sends messages to all pods.

    supervisor                            |  this process
    ------------------------------------- | -----------------------------------------------
    warm, open, persist, load, ping,  --> |  reader (main thread) --> queue --> runner thread
      over                                |
    done, failed, events, pong        <-- |  <-----------------------------------+
    EOF                               --> |  ends at once: its supervisor is gone

Called from: `python -m pillion_sidecar.executor.worker FD` by `supervisor.executor_process`. A request that fails answers with the failure and
the loop goes on; only the supervisor ends this process.
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
from typing import Any, Final

from pillion.errors import ErrorDocument, InternalError, PillionError, RemoteFailure, SidecarError
from pillion.wire import messages, names, policy
from pillion_sidecar import log
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import ownership
from pillion_sidecar.executor import garbage
from pillion_sidecar.executor import session as session_module
from pillion_sidecar.executor.exchange import broadcast
from pillion_sidecar.executor.exchange.watchdog import SessionLeft, Watchdog
from pillion_sidecar.executor.load import request as request_module
from pillion_sidecar.executor.load import restore
from pillion_sidecar.executor.save import commit, persist, rescue
from pillion_sidecar.executor.save.request import Request
from pillion_sidecar.executor.session import with_failover

_log = logging.getLogger(__name__)

NICE: Final = 10
"""Lower CPU priority than the trainer: what persists may not slow the step down (nvrx has the same knob)."""
QUEUE_LIMIT: Final = 64
"""Requests waiting; the supervisor sends one at a time, this only bounds a defect."""


class Worker:
    """See the module."""

    def __init__(self, sock: socket.socket, broken: Exception | None = None) -> None:
        self._sock = sock
        self._broken = broken
        self._garbage = garbage.Garbage(os.environ)
        self._send_lock = threading.Lock()
        self._requests: queue.Queue[messages.Message] = queue.Queue(QUEUE_LIMIT)
        self._outgoing: queue.Queue[messages.Message] = queue.Queue(QUEUE_LIMIT)
        self._context: session_module.Context | None = None
        self._watch: Watchdog | None = None
        """Of the session that is open, or being opened."""
        self._over = ""
        """The session that ended last: what is done for it leaves its waits for other pods."""
        self._state: ownership.State | None = None
        """What was said last about the session's trainers; None: nothing since it is being opened."""
        self._signals: broadcast.Signals | None = None
        self._store: Any = None
        """Where the session of `_context` meets."""
        self._writer: Mapping[str, Any] | None = None
        """The policy's storage.writer, for saves that name no destination."""
        self._operations: Mapping[str, Callable[[messages.Message], dict[str, Any]]] = {
            "warm": self._warm,
            "open": self._open,
            "persist": self._persist,
            "load": self._load,
            "withdraw": self._withdraw,
            "rescue": self._rescue,
            "retain": self._retain,
        }

    def serve(self) -> None:
        """Serve until the supervisor closes the channel. Blocks: for the life of the process."""
        threading.Thread(target=self._run, name="pillion-run", daemon=True).start()
        # Not behind the running save, as an announcement is about the next one, nor in this thread: the store may not answer.
        threading.Thread(target=self._tell, name="pillion-tell", daemon=True).start()
        decoder = messages.Decoder()
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                for message in messages.receive(self._sock, decoder):
                    if message["type"] == "ping":
                        self._done(message, {"waits": self._waits()})
                    elif message["type"] == "over":
                        self._over = message["session"]
                        self._done(message, {})
                    elif message["type"] == "state":
                        self._change(message)
                    else:
                        self._queue(self._outgoing if message["type"] == "signal" else self._requests, message)

    def _queue(self, waiting: queue.Queue[messages.Message], message: messages.Message) -> None:
        try:
            waiting.put_nowait(message)
        except queue.Full:
            error = SidecarError(f"{QUEUE_LIMIT} messages wait before this one: the store answers none of them")
            self._send({"type": "failed", "id": message["id"], "error": _document(error).to_document()})

    def _change(self, message: messages.Message) -> None:
        """The session's trainers have come or gone: its record on the root says so, for whoever wants the root next."""
        lease = self._context.lease if self._context is not None else None
        self._state = ownership.State(message["state"])
        if lease is None:
            self._done(message, {})
        else:
            lease.change(self._state, lambda: self._done(message, {}))

    def _send(self, message: Mapping[str, object]) -> None:
        frame = messages.encode(message)
        with self._send_lock, contextlib.suppress(OSError):
            self._sock.sendall(frame)

    def _done(self, request: messages.Message, result: Mapping[str, Any], **state: Any) -> None:
        self._send({"type": "done", "id": request["id"], "result": result, **state})

    def _run(self) -> None:
        while True:
            request = self._requests.get()
            try:
                if self._broken is not None:
                    raise self._broken
                answer = self._operations[request["type"]](request)
                self._done(request, answer, **self._session_state())
                if request["type"] == "persist":
                    self._garbage.saved()
            except (
                BaseException
            ) as raised:  # a boundary: any failure is an answer, a foreign sys.exit too, and the loop goes on
                err = SidecarError(str(raised)) if isinstance(raised, SessionLeft) else raised
                _log.warning("%s failed: %s", request["type"], err, exc_info=not isinstance(err, PillionError))
                state = self._session_state()
                self._send({"type": "failed", "id": request["id"], "error": _document(err).to_document(), **state})
            finally:
                if self._watch is not None:
                    self._watch.idle()

    def _store_lost(self, session: str) -> None:
        self._send({"type": "store_lost", "event": True, "session": session})

    def _waits(self) -> dict[str, Any] | None:
        watch = self._watch
        return watch.report() if watch is not None else None

    def _session_state(self) -> dict[str, Any]:
        """What a successor of this process has to go on with."""
        context = self._context
        if context is None:
            return {}
        counts = {"loads": context.loads, "epoch": context.epoch, "rescues": context.rescues}
        return {"session_state": counts | {"store_lost": context.store_lost}}

    def _tell(self) -> None:
        while True:
            message = self._outgoing.get()
            context, between = self._context, self._signals
            try:
                if context is None or between is None:
                    raise InternalError("the executor has no session with other pods")
                context.watch.store("a message to all pods")
                try:
                    between.send(message["message"])
                finally:
                    context.watch.idle()
                self._done(message, {})
            except Exception as err:  # a boundary: torch has errors of several classes for a store
                self._send({"type": "failed", "id": message["id"], "error": _document(err).to_document()})

    # --- operations (runner thread) ------------------------------------------------------------------------------------

    def _warm(self, request: messages.Message) -> dict[str, Any]:
        """Import what the session needs of torch: it takes seconds, and serves whichever session comes next as well."""
        for module in request["modules"]:
            importlib.import_module(f"{__package__}.{module}")
        return {}

    def _open(self, request: messages.Message) -> dict[str, Any]:
        if self._signals is not None:
            self._signals.close()
        if self._context is not None:
            self._leave(self._context, request["session"])
        self._context = self._signals = None
        document = request["session"]
        self._watch = Watchdog(
            storage_timeout_s=float(document["storage_timeout_s"]),
            store_timeout_s=float(document["store_timeout_s"]),
            is_over=lambda: self._over == document["session"],
        )
        self._state = None
        self._context = session_module.open_context(document, self._watch)
        if self._state is not None and self._context.lease is not None:
            # It changed while the session was being opened.
            self._context.lease.change(self._state, lambda: None)
        self._store = document["store"]
        named = policy.parse(document["policy"], embedded=True).storage.writer
        self._writer = None if named is None else {"name": named.name, "arguments": dict(named.arguments)}
        if self._context.signal_store is not None:
            heard = document["signals"]
            self._context.watch.store("messages to all pods")
            self._signals = broadcast.Signals(
                self._context.signal_store,
                lambda number, message: self._send({**message, "event": True, "number": number}),
                pods=[pod[0] for pod in self._context.pods],
                first_rank=self._context.first_rank,
                seen=int(heard) if heard is not None else None,
                on_lost=functools.partial(self._store_lost, self._context.session),
            )
        return {
            "generation": self._context.generation,
            "store": self._context.store_address,
            "signals": self._signals.begun if self._signals is not None else None,
        }

    def _leave(self, context: session_module.Context, successor: messages.Message) -> None:
        """A session is over: close what it had, and take its keys out of a store that goes on, as torchrun's agent's does."""
        for segment in context.segments.values():
            segment.close()
        if context.lease is not None:
            context.lease.close()
        # Trainers that come back in one pod use no store, and the one that they leave may go on.
        is_restart = successor["session"] != context.session and successor["store"] in (None, self._store)
        if is_restart and self._store is not None and context.coordinator and not context.store_lost:
            # torch's errors of a store are RuntimeErrors. What stays then are some two dozen small keys.
            with contextlib.suppress(RuntimeError, PillionError):
                context.exchange.forget(context.phases_left())
                context.exchange.unpublish(context.published_left())
                if self._signals is not None:
                    context.watch.store("forget messages to all pods")
                    self._signals.forget()

    def _opened(self) -> session_module.Context:
        if self._context is None:
            raise InternalError("the executor has no session")
        return self._context

    def _persist(self, request: messages.Message) -> dict[str, Any]:
        context = self._opened()
        wanted = Request.from_document(request["save"])
        context.retention = policy.parse({"retention": request["save"]["retention"]}, embedded=True).retention
        if wanted.persist and wanted.destination is None and self._writer is not None:
            path = context.step_path(wanted.step)
            wanted = dataclasses.replace(wanted, destination={"path": path, "writer": self._writer, "retained": True})
        with_failover(context, lambda: persist.check_destination(context, wanted))
        if wanted.destination and wanted.destination.get("writer") and wanted.persist:
            from pillion_sidecar.executor.save import dcp_writer  # torch.distributed.checkpoint

            return with_failover(context, lambda: dcp_writer.persist(context, wanted))
        outcome = with_failover(context, lambda: persist.persist(context, wanted))
        if not wanted.persist:
            self._digest(wanted)
        return outcome

    def _digest(self, wanted: Request) -> None:
        """Frame and digest a slot of every local rank, so that a restore from the arena can be verified."""
        context = self._opened()
        for segment in context.segments.values():
            slot_image = context.reader.read(segment, wanted.slot, step=wanted.step)
            image.digest_all(image.frame(slot_image))

    def _withdraw(self, request: messages.Message) -> dict[str, Any]:
        context, step = self._opened(), int(request["step"])
        error = ErrorDocument.from_document(request["error"])
        kind = {"persist": bool(request["persist"]), "rescued": bool(request.get("rescued", False))}
        with_failover(context, lambda: persist.withdraw(context, step, error, **kind))
        return {}

    def _rescue(self, request: messages.Message) -> dict[str, Any]:
        context = self._opened()
        held, persisted, calls = request["held"], request["persisted"], request["calls"]
        born = {int(step): at for step, at in request["born"].items()}
        return dataclasses.asdict(
            with_failover(context, lambda: rescue.agree(context, held, persisted, calls, born=born))
        )

    def _retain(self, request: messages.Message) -> dict[str, Any]:
        context = self._opened()
        context.retention = policy.parse({"retention": request["retention"]}, embedded=True).retention
        return {"more": commit.retain(context, int(request["current"]), float(request["slice_s"]))}

    def _load(self, request: messages.Message) -> dict[str, Any]:
        def progress(event: Mapping[str, Any]) -> None:
            self._send({**event, "event": True})

        context, wanted = self._opened(), request_module.Request.from_document(request["load"])
        # Counted once, whatever becomes of it: the pods meet under this number.
        context.loads += 1
        return with_failover(context, lambda: restore.load(context, wanted, progress))


def _document(err: BaseException) -> ErrorDocument:
    if isinstance(err, PillionError):
        return ErrorDocument.from_exception(err)
    text = "".join(traceback.format_exception(err))
    failure = RemoteFailure.from_exception(err, pid=os.getpid(), traceback_text=text)
    return ErrorDocument("SaveError", "the executor failed", {-1: failure})


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Its supervisor decides when it ends: a SIGTERM to the whole group must not cut a drain short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.configure(sys.argv[2])
    with contextlib.suppress(OSError):
        os.nice(NICE)
    broken = None
    # Behind its own: a module of the trainer's must not take the place of one that the executor needs.
    more = os.environ.get(names.ENV_IMPORT_PATH, "").split(os.pathsep)
    sys.path += [each for each in more if each and each not in sys.path]
    try:
        for name in filter(None, os.environ.get("PILLION_PRELOAD", "").split(",")):
            importlib.import_module(name)
    except Exception as err:  # a boundary: the error goes to whoever asks, and the supervisor starts a fresh process
        broken = err
    sock = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker(sock, broken)
    worker.serve()
    # Daemon threads may be in a write that never returns: the supervisor is gone, nobody waits for them.
    os._exit(0)


if __name__ == "__main__":
    main()
