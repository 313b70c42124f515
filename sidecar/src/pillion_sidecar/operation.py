"""
Requests to the executor, and the executor's life: started before it is needed, opened for the session, replaced when it dies.

Called from: the supervisor, one operation at a time (a lock keeps loads and saves apart).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pillion.errors import ErrorDocument, LoadError, PillionError, SaveError
from pillion.wire import messages, policy
from pillion_sidecar import settings
from pillion_sidecar.arena.slots import Save
from pillion_sidecar.executor.parent import Executor, ExecutorDied
from pillion_sidecar.metrics import Metrics
from pillion_sidecar.pod import Pod

_log = logging.getLogger(__name__)


class Operations:
    """See the module."""

    def __init__(
        self, of: settings.Settings, metrics: Metrics, *, on_event: Callable[[messages.Message], None]
    ) -> None:
        self._settings = of
        self._metrics = metrics
        self._pass_on = on_event
        self._executor: Executor | None = None
        self._pod: Pod | None = None
        self._opened: str | None = None
        """The session that the living executor has open."""
        self._opening: dict[str, Any] = {}
        self._generation: int | None = None
        """The session's generation: a successor goes on in it."""
        self._generation_of: str | None = None
        self._loads = self._epoch = 0
        """As Context.loads and Context.epoch of this session: a successor counts on from them, or it would never meet its peers."""
        self._signals: int | None = None
        """Number of the last message to all pods that was passed on, likewise; None: of a new session."""
        self._lock = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def executor_pid(self) -> int | None:
        return self._executor.pid if self._executor is not None else None

    def _on_event(self, event: messages.Message) -> None:
        self._signals = event.pop("number", self._signals)
        self._pass_on(event)

    async def prestart(self) -> None:
        """Start the executor ahead of the first session, so that the first save finds it warm."""
        async with self._lock:
            await self._running()

    def session(self, pod: Pod) -> None:
        """A new session: the executor opens it beside the trainer's first steps. A failure shows at the first save."""
        self._pod = pod
        task = asyncio.create_task(self._open_ahead(pod))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _revive(self) -> None:
        """The executor ended by itself: its successor is ready before the next save needs it."""
        if self._pod is not None:
            self.session(self._pod)

    async def _open_ahead(self, pod: Pod) -> None:
        try:
            await self.open(pod)
        except PillionError as err:
            _log.warning("the executor could not open the session yet: %s", err)

    async def open(self, pod: Pod) -> dict[str, Any]:
        """
        Have a running executor with this pod's session open; what it said (generation, store address).

        Raises:
            PillionError: why it could not; the executor is ended, and the next call starts a fresh one.
        """
        async with self._lock:
            return await self._open(pod)

    async def _running(self) -> Executor:
        if self._executor is not None and self._executor.pid is not None:
            return self._executor
        if self._executor is not None:
            await self._executor.stop()
            self._metrics.executor_restarts += 1
        self._opened = None
        self._executor = Executor(
            log_level=self._settings.log_level,
            ping_timeout_s=self._settings.ping_timeout_s,
            on_event=self._on_event,
            on_exit=self._revive,
        )
        await self._executor.start()
        return self._executor

    async def _open(self, pod: Pod) -> dict[str, Any]:
        executor = await self._running()
        session = pod.identity.session
        if self._opened == session:
            return self._opening
        known = self._generation if self._generation_of == session else None
        if known is None:
            self._loads = self._epoch = 0
            self._signals = None
        document = pod.session_document(
            peer_timeout_s=self._settings.peer_timeout_s,
            persist_timeout_s=self._settings.persist_timeout_s,
            write_threads=self._settings.write_threads,
            generation=known,
        )
        document |= {"loads": self._loads, "epoch": self._epoch, "signals": self._signals}
        try:
            self._opening = await executor.request({"type": "open", "session": document})
        except PillionError:
            # Half open is not open: the next save starts from a fresh process.
            await executor.stop()
            raise
        self._opened = session
        self._signals = self._opening.get("signals") if self._signals is None else self._signals
        self._generation, self._generation_of = int(self._opening["generation"]), session
        return self._opening

    async def persist(self, pod: Pod, save: Save, about: Mapping[str, Any]) -> dict[str, Any]:
        """
        Run one save.

        Args:
            pod: of the session.
            save: what to persist.
            about: what its manifest says besides.

        Raises:
            ExecutorDied: nothing is known of the save; a successor may repeat it.
            SaveError: it failed.
        """
        request = {
            "step": save.step,
            "slot": save.slot,
            "persist": save.persist,
            "destination": save.destination,
            "sequence": save.step + 1 if save.destination else 0,
            # As the policy is now: it may have changed since the session was opened.
            "retention": policy.dump(pod.policy)["retention"],
            **about,
        }
        try:
            return await self._run(pod, {"type": "persist", "save": request})
        except SaveError:
            if save.destination is not None:
                # Its caller was told, and decides; nobody comes back to this arena for it, so that it is not owed to
                # storage at the drain.
                save.persist = False
            raise

    async def load(self, pod: Pod, request: dict[str, Any]) -> dict[str, Any]:
        """
        Run one load; when the executor dies with it, once more by its successor.

        Raises:
            LoadError.
        """
        message = {"type": "load", "load": request}
        try:
            try:
                result = await self._run(pod, message)
            except ExecutorDied as err:
                _log.warning("the load goes to the executor's successor: %s", err)
                result = await self._run(pod, message)
        except ExecutorDied as err:
            raise LoadError(f"two executors in a row died while they loaded: {err}") from err
        finally:
            self._loads += 1
        self._epoch += 1
        return result

    async def withdraw(self, pod: Pod, step: int, error: ErrorDocument, *, persist: bool) -> None:
        """Tell the other pods that this one has no part in `step`."""
        try:
            await self._run(pod, {"type": "withdraw", "step": step, "persist": persist, "error": error.to_document()})
        except PillionError as err:
            _log.info("step %d was withdrawn: %s", step, err)

    async def signal(self, pod: Pod, message: dict[str, Any]) -> None:
        """Tell every pod of the job; lost when there is no way now: whoever needs it asks again."""
        try:
            if self._opened != pod.identity.session:
                await self.open(pod)
            if self._executor is not None:
                # Not under the lock: a save may hold it for minutes.
                await self._executor.request({"type": "signal", "message": message})
        except PillionError as err:
            _log.warning("other pods were not told %s: %s", message, err)

    async def _run(self, pod: Pod, message: dict[str, Any]) -> dict[str, Any]:
        async with self._lock:
            await self._open(pod)
            executor = self._executor
            if executor is None:
                raise ExecutorDied("the executor is not running")
            return await executor.request(message)

    async def stop(self) -> None:
        self._pod = None
        for task in list(self._background):
            task.cancel()
        if self._executor is not None:
            await self._executor.stop()
