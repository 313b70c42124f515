"""
One sidecar process: lock, server, supervisor, signals, and the order in which they end.

Called from: `__main__`. The only place where the parts meet.

    SIGUSR1              save now: the trainers save at the next step that all of them have ahead of them
    SIGTERM, SIGINT      save now, then drain: the newest snapshot and all that is queued, within the policy's
                         drain.timeoutSeconds; then exit
    last goodbye         an embedded sidecar exits and removes its arena
    trainers gone        an embedded sidecar keeps the arena for `linger_s`, then exits likewise
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import shutil
import signal
import time
from enum import IntEnum
from typing import Final

from pillion.wire import names, policy
from pillion_sidecar import control
from pillion_sidecar.settings import Settings
from pillion_sidecar.supervisor import Supervisor

_log = logging.getLogger(__name__)

IDLE_CHECK_S: Final = 0.1
"""How often an embedded sidecar looks whether it is needed: a torchrun job's end waits for nothing here."""
LAST_SAVE_S: Final = 10.0
"""How long a drain waits for living trainers to make one more save: a few of their steps. The newest snapshot goes anyway."""
NICE: Final = 5
"""Above the executor's, below the trainer's."""


class Exit(IntEnum):
    """Exit statuses of the sidecar."""

    CLEAN = 0
    """Everything sealed is on storage, or there was nothing."""
    INTERNAL = 70
    """An internal error; see the log."""
    LOST = 74
    """The drain's bound came first: the newest snapshot is not on storage."""
    ALREADY_RUNNING = 75
    """Another sidecar owns the runtime directory."""
    BAD_SETTINGS = 78
    """A setting is wrong; the text says which."""


async def run(settings: Settings) -> Exit:
    """Run until it is told to end, or not needed any more. Blocks: for the sidecar's life."""
    lock = _lock(settings)
    if lock is None:
        _log.info("another sidecar owns %s", settings.runtime_dir)
        return Exit.ALREADY_RUNNING
    with contextlib.suppress(OSError):
        os.nice(NICE)
    supervisor = Supervisor(settings)
    server = control.Server(os.path.join(settings.runtime_dir, names.CONTROL_SOCKET), supervisor)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    asked: set[asyncio.Task[None]] = set()
    loop.add_signal_handler(signal.SIGUSR1, lambda: asked.add(loop.create_task(supervisor.save_now())))
    removable = False
    try:
        await supervisor.start()
        await server.start()
        _log.info("listening in %s", settings.runtime_dir, extra={"pid": os.getpid()})
        if settings.embedded:
            await _until_unneeded(supervisor, stop)
            server.stop_listening()
            while server.num_connections and not stop.is_set():
                # A trainer came in the last moment: it is served. No await lies between the look and the close of the door.
                await server.start()
                await _until_unneeded(supervisor, stop)
                server.stop_listening()
        else:
            await stop.wait()
        drained = await _drain(supervisor)
        removable = drained and settings.embedded
        return Exit.CLEAN if drained else Exit.LOST
    finally:
        await server.close()
        await supervisor.stop()
        if supervisor.pod is not None:
            if removable:
                supervisor.pod.remove()
            else:
                supervisor.pod.close()
        if removable:
            # The lock file goes last, with the folder: whoever comes next makes both anew.
            shutil.rmtree(settings.runtime_dir, ignore_errors=True)
        os.close(lock)


def _lock(settings: Settings) -> int | None:
    """The runtime directory's lock, held until this process ends; None when another sidecar has it."""
    path = os.path.join(settings.runtime_dir, names.SIDECAR_LOCK)
    os.makedirs(settings.runtime_dir, mode=0o700 if settings.embedded else 0o777, exist_ok=True)
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one before may have removed the folder between our open and our lock: a lock on a removed file guards nothing.
        if os.stat(path).st_ino == os.fstat(lock).st_ino:
            return lock
    except FileNotFoundError:
        pass
    except OSError as err:
        if err.errno not in (errno.EAGAIN, errno.EACCES):
            os.close(lock)
            raise
    os.close(lock)
    return None


async def _until_unneeded(supervisor: Supervisor, stop: asyncio.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), IDLE_CHECK_S)
        if supervisor.clients or supervisor.busy():
            supervisor.idle_since = time.monotonic()
        elif supervisor.parted or time.monotonic() - supervisor.idle_since > supervisor.settings.linger_s:
            return


async def _drain(supervisor: Supervisor) -> bool:
    pod = supervisor.pod
    if pod is None:
        return True
    deadline = time.monotonic() + pod.policy.drain.timeout_seconds
    if supervisor.clients and pod.policy.trigger.on_termination is policy.OnTermination.SAVE:
        before = supervisor.metrics.last_committed_step
        await supervisor.save_now()
        grace = min(deadline, time.monotonic() + LAST_SAVE_S)
        while supervisor.clients and time.monotonic() < grace and supervisor.metrics.last_committed_step == before:
            await asyncio.sleep(IDLE_CHECK_S)
    supervisor.rescue()
    drained = await supervisor.quiet(max(0.0, deadline - time.monotonic()))
    newest = pod.table.newest_complete()
    if not drained or (newest is not None and newest.persist and not newest.persisted):
        _log.error("ends with step %s not on storage; the arena keeps it", newest.step if newest is not None else None)
        return False
    return True
