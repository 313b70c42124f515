"""
One sidecar process: starts and ends its lock, server, supervisor and signal handlers, in this order.

Called from: `__main__`. No other module connects these parts.

    SIGUSR1              save now: the trainers save at the next step that all of them have ahead of them
    SIGTERM, SIGINT      save now, then drain: the newest snapshot and all queued saves, within the policy's
                         drain.timeoutSeconds; then exit. In a pod, the trainers end first, within the same grace period of
                         the kubelet. Injection extends the period by the drain's time. The rest of it bounds the drain as
                         well: then comes SIGKILL, and the arena is lost with the pod
    last goodbye         an embedded sidecar exits and removes its arena
    trainers gone        an embedded sidecar keeps the arena for `linger_s`, then exits in the same way
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
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.supervisor import server as server_module
from pillion_sidecar.supervisor.dispatcher import Supervisor
from pillion_sidecar.supervisor.pod_end import LAST_SAVE_TIMEOUT_S

if TYPE_CHECKING:
    from pillion_sidecar.reporting import reporter

_log = logging.getLogger(__name__)

IDLE_CHECK_S: Final = 0.1
"""Interval at which an embedded sidecar checks whether it is still needed. Nothing waits for its end."""
PRIVATE_DIRECTORY: Final = 0o700
"""Mode of the runtime directory without a cluster."""
SHARED_DIRECTORY: Final = 0o777
"""Mode of a runtime directory that this process creates in a pod, as the kubelet creates an emptyDir. Trainer and sidecar may be different
users."""
NICE: Final = 5
"""Nice value of the supervisor, between the trainer's and the executor's."""


class Exit(IntEnum):
    """Exit statuses of the sidecar."""

    CLEAN = 0
    """All sealed saves are on storage, or there were none."""
    INTERNAL = 70
    """An internal error occurred; see the log."""
    LOST = 74
    """The drain's timeout came first. The newest snapshot is not on storage."""
    ALREADY_RUNNING = 75
    """Another sidecar owns the runtime directory."""
    BAD_SETTINGS = 78
    """A setting is wrong. The text names it."""


async def run(settings: Settings) -> Exit:
    """Run the sidecar until a signal ends it, or until no trainer needs it. Blocks: for the sidecar's life."""
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
            # Imported late, because prometheus_client takes memory that a pod without the endpoint saves.
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
    """Close the arena. `removable`: nobody needs the arena any more, so remove it and the runtime directory."""
    pod, runtime_dir = supervisor.pod, supervisor.settings.runtime_dir
    if pod is not None:
        if removable:
            pod.remove()
        else:
            pod.close()
    if removable:
        if pod is not None and pod.identity.root:
            _keep_log(supervisor.open_root(pod.identity.root), runtime_dir, pod.identity.local_ranks[0])
        # The lock file is removed with the directory. The next sidecar creates both again.
        shutil.rmtree(runtime_dir, ignore_errors=True)


def _keep_log(root: Folder, runtime_dir: str, first_rank: int) -> None:
    """Append the log of an embedded sidecar to the one on its root. Blocks: up to log.KEEP_TIMEOUT_S."""
    if root.path is not None:
        log.keep(runtime_dir, root.path, first_rank)
        return
    internal, name = root.below(names.INTERNAL_DIR), log.kept_name(first_rank)

    def append(data: bytes) -> None:
        try:
            before = internal.read(name)
        except FileNotFoundError:
            before = b""
        internal.put(name, (before + data)[-log.MAX_BYTES :])

    log.hand_over(runtime_dir, append)


def _remove_leftovers(runtime_dir: str) -> None:
    """
    Remove abandoned arenas of earlier sidecars, in a thread.

    Only if this runtime directory has a derived name. Beside a directory that the user has named there are none.
    """
    base, name = os.path.split(runtime_dir)
    if name.startswith(names.RUNTIME_PREFIX):
        remove = functools.partial(leftovers.remove, base, but=runtime_dir)
        threading.Thread(target=remove, name="pillion-leftovers", daemon=True).start()


def _calling(supervisor: Supervisor) -> reporter.Reporter | None:
    """Return the reporter. None if the settings for calling home are invalid; saves work without it."""
    # Imported late, because TLS takes memory that a sidecar without a cluster saves.
    from pillion_sidecar.reporting import reporter

    try:
        return reporter.Reporter(supervisor)
    except ValueError as err:
        _log.error("this sidecar cannot report to the controller: %s; saves are not affected", err)
        return None


def _lock(settings: Settings) -> int | None:
    """Take the runtime directory's lock, until this process ends. Return None if another sidecar has it."""
    path = os.path.join(settings.runtime_dir, names.SIDECAR_LOCK)
    if not os.path.isdir(settings.runtime_dir):
        mode = PRIVATE_DIRECTORY if settings.embedded else SHARED_DIRECTORY
        os.makedirs(settings.runtime_dir, mode=PRIVATE_DIRECTORY, exist_ok=True)
        os.chmod(settings.runtime_dir, mode)  # whatever the umask
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous sidecar may have removed the directory between the open and the lock. A lock on a removed file guards nothing.
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
    """(embedded) Serve until no trainer needs this sidecar. A trainer that connects at the last moment is still served."""
    await _until_unneeded(supervisor, stop)
    server.stop_listening()
    while server.num_connections and not stop.is_set():
        # There is no await between this check and `stop_listening`, so no connection comes in between.
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
        grace = min(deadline, time.monotonic() + LAST_SAVE_TIMEOUT_S)
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
