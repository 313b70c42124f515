"""
One sidecar process: lock, server, supervisor, signals, and the order in which they end.

Called from: `__main__`. The only place where the parts meet.

    SIGUSR1              save now: the trainers save at the next step that all of them have ahead of them
    SIGTERM, SIGINT      save now, then drain: the newest snapshot and all that is queued, within the policy's
                         drain.timeoutSeconds; then exit. In a pod the kubelet's grace period is shared with the trainers,
                         which end first: injection raises it by the drain's time, and what is left of it when SIGTERM comes
                         bounds the drain as well (SIGKILL; the arena goes with the pod)
    last goodbye         an embedded sidecar exits and removes its arena
    trainers gone        an embedded sidecar keeps the arena for `linger_s`, then exits likewise
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import logging
import os
import shutil
import signal
import threading
import time
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from pillion.wire import names
from pillion_sidecar import affinity, log
from pillion_sidecar.arena import leftovers
from pillion_sidecar.concurrency import tasks
from pillion_sidecar.settings import Settings
from pillion_sidecar.supervisor import server as server_module
from pillion_sidecar.supervisor.dispatcher import Supervisor
from pillion_sidecar.supervisor.pod_end import LAST_SAVE_S

if TYPE_CHECKING:
    from pillion_sidecar.reporting import reporter

_log = logging.getLogger(__name__)

IDLE_CHECK_S: Final = 0.1
"""How often an embedded sidecar looks whether it is needed: a torchrun job's end waits for nothing here."""
PRIVATE_DIRECTORY: Final = 0o700
SHARED_DIRECTORY: Final = 0o777
"""Mode of a runtime directory that this process makes in a pod, as the kubelet makes an emptyDir: trainer and sidecar may be
different users."""
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
        _log.info("another sidecar has the runtime directory %s: this one ends", settings.runtime_dir)
        return Exit.ALREADY_RUNNING
    if settings.embedded:
        log.tend(settings.runtime_dir)
        affinity.forget_memory_policy()
        _remove_leftovers(settings.runtime_dir)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    supervisor = Supervisor(settings)
    server = server_module.ControlServer(os.path.join(settings.runtime_dir, names.CONTROL_SOCKET), supervisor)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, supervisor.trainers.save_now)
    removable = False
    caller, outside = None, tasks.BackgroundTasks()
    try:
        await supervisor.start()
        await server.start()
        if settings.metrics_port:
            # prometheus_client: memory that a pod without the endpoint has no use for.
            from pillion_sidecar.reporting import prometheus

            prometheus.start(supervisor, settings.metrics_port)
        if settings.home_url:
            caller = _calling(supervisor)
        if caller is not None:
            outside.start(caller.run(), "calling home")
        _log.info("listening in %s", settings.runtime_dir, extra={"pid": os.getpid()})
        if settings.embedded:
            await _serve_until_unneeded(supervisor, server, stop)
        else:
            await stop.wait()
        drained = await _drain(supervisor)
        removable = drained and settings.embedded
        if caller is not None:
            await caller.last()
        return Exit.CLEAN if drained else Exit.LOST
    finally:
        await outside.stop()
        if caller is not None:
            caller.close()
        await server.close()
        await supervisor.stop()
        _leave(supervisor, removable=removable)
        os.close(lock)


def _leave(supervisor: Supervisor, *, removable: bool) -> None:
    """Close the arena; `removable`: nobody needs it any more, and it goes with the runtime directory."""
    pod, runtime_dir = supervisor.pod, supervisor.settings.runtime_dir
    if pod is not None:
        if removable:
            pod.remove()
        else:
            pod.close()
    if removable:
        if pod is not None and pod.identity.root:
            log.keep(runtime_dir, pod.identity.root, pod.identity.local_ranks[0])
        # The lock file goes last, with the folder: the next sidecar makes both again.
        shutil.rmtree(runtime_dir, ignore_errors=True)


def _remove_leftovers(runtime_dir: str) -> None:
    """Free what sidecars before this one have left in memory, beside everything else. A folder that somebody has named has no others beside it."""
    base, name = os.path.split(runtime_dir)
    if name.startswith(names.RUNTIME_PREFIX):
        remove = functools.partial(leftovers.remove, base, but=runtime_dir)
        threading.Thread(target=remove, name="pillion-leftovers", daemon=True).start()


def _calling(supervisor: Supervisor) -> reporter.Reporter | None:
    """Whoever calls home; None when the settings do not allow it: checkpoints are made all the same."""
    # TLS: memory that a sidecar without a cluster has no use for.
    from pillion_sidecar.reporting import reporter

    try:
        return reporter.Reporter(supervisor)
    except ValueError as err:
        _log.error("this sidecar cannot report to the controller: %s; saves are not affected", err)
        return None


def _lock(settings: Settings) -> int | None:
    """The runtime directory's lock, held until this process ends; None when another sidecar has it."""
    path = os.path.join(settings.runtime_dir, names.SIDECAR_LOCK)
    if not os.path.isdir(settings.runtime_dir):
        mode = PRIVATE_DIRECTORY if settings.embedded else SHARED_DIRECTORY
        os.makedirs(settings.runtime_dir, mode=PRIVATE_DIRECTORY, exist_ok=True)
        os.chmod(settings.runtime_dir, mode)  # whatever the umask
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
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


async def _serve_until_unneeded(
    supervisor: Supervisor, server: server_module.ControlServer, stop: asyncio.Event
) -> None:
    """(embedded) Serve until no trainer needs this sidecar; one that comes in the last moment is served."""
    await _until_unneeded(supervisor, stop)
    server.stop_listening()
    while server.num_connections and not stop.is_set():
        # No await lies between the look and the close of the door.
        await server.start()
        await _until_unneeded(supervisor, stop)
        server.stop_listening()


async def _until_unneeded(supervisor: Supervisor, stop: asyncio.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), IDLE_CHECK_S)
        trainers = supervisor.trainers
        if trainers.clients or supervisor.persister.busy():
            trainers.idle_since = time.monotonic()
            log.tend(supervisor.settings.runtime_dir)
        elif trainers.parted or time.monotonic() - trainers.idle_since > supervisor.settings.linger_s:
            return


async def _drain(supervisor: Supervisor) -> bool:
    pod = supervisor.pod
    if pod is None:
        return True
    deadline = time.monotonic() + pod.policy.drain.timeout_seconds
    before = supervisor.sidecar_status.metrics.last_committed_step
    if supervisor.terminating(signalled=True):
        grace = min(deadline, time.monotonic() + LAST_SAVE_S)
        while supervisor.trainers.clients and time.monotonic() < grace:
            if supervisor.sidecar_status.metrics.last_committed_step != before:
                break
            await asyncio.sleep(IDLE_CHECK_S)
    supervisor.persister.rescue()
    drained = await supervisor.persister.quiet(max(0.0, deadline - time.monotonic()))
    newest = pod.table.newest_complete()
    if not drained or (newest is not None and newest.persist and not newest.persisted):
        _log.error(
            "the sidecar ends while step %s is not on storage; the snapshot stays in memory for a restart",
            newest.step if newest is not None else None,
        )
        return False
    return True
