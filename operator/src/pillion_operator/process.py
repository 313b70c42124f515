"""
The whole of: what webhook and controller have in common as processes: signals, the client of the API server, tasks, exit statuses.

Called from: `webhook.app` and `controller.app`. Each of them has its own tasks and its own order of ending.
Must never: end the process while a task still runs that an `async with` around it owns.
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from enum import IntEnum
from typing import Any, Final

from pillion_operator import listener
from pillion_operator.cluster import client

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)


class Exit(IntEnum):
    """Exit statuses of the processes in the cluster."""

    CLEAN = 0
    """The process received SIGTERM or SIGINT, and stopped in order."""
    UNAVAILABLE = 69
    """No API server is configured, or a port cannot be opened."""
    INTERNAL = 70
    """A task exited that runs for the process's life; see the log."""
    LEASE_LOST = 75
    """The controller lost its Lease: another replica may be active."""


class StopSignals:
    """
    The signals that stop the process, as an event.

    Owns: the loop's handlers of `STOP_SIGNALS`.
    """

    def __init__(self) -> None:
        self.received = asyncio.Event()

    def install(self) -> None:
        """Handle the signals from now on, also where a library has put its own handlers in place of these."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.received.set)


def run(serve: Callable[[client.Client, StopSignals], Awaitable[Exit]]) -> Exit:
    """
    Run one process of the operator, from its start to its exit status. Blocks: for the process's life.

    Args:
        serve: gets access to the API server, and the signals; returns when the process is to end.
    """
    listener.limit_tls_memory()
    return asyncio.run(_run(serve))


async def _run(serve: Callable[[client.Client, StopSignals], Awaitable[Exit]]) -> Exit:
    signals = StopSignals()
    signals.install()
    try:
        async with await client.Client.connect() as api:
            return await serve(api, signals)
    except (client.Unreachable, OSError) as err:
        _log.error("cannot start: %s", err)
        return Exit.UNAVAILABLE


def start(coroutines: Iterable[tuple[str, Coroutine[Any, Any, None]]]) -> list[asyncio.Task[None]]:
    """Start tasks that run for the process's life, by name. A task that exits by itself is an error in the log."""
    tasks = [asyncio.create_task(coroutine, name=name) for name, coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(_log_exit)
    return tasks


async def cancel(tasks: Iterable[asyncio.Task[Any]], timeout_s: float) -> None:
    """Cancel tasks. Blocks: until they have ended, `timeout_s` at most."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending, timeout=timeout_s)


def _log_exit(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        _log.error("task %s exited unexpectedly", task.get_name(), exc_info=task.exception())
