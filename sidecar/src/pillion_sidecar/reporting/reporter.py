"""
The whole of: when the coordinator's sidecar calls home, and what it does with the answers.

    every interval_s, as the last answer said          and at most once in NEWS_PAUSE_S when something happened
    no answer: again after a pause that doubles up to BACKOFF_MOST_S, news or not; training never notices

Called from: `app`: `run` beside everything else, `last` at the end.
Must never: hold up the drain by more than LAST_CALL_S, or take the loop down with what an answer contains.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from typing import Final

from pillion.wire import home
from pillion_sidecar.concurrency.blocking import BlockingCaller, StillBusy
from pillion_sidecar.reporting import inventory, report, transport
from pillion_sidecar.supervisor.dispatcher import Supervisor

_log = logging.getLogger(__name__)

NEWS_PAUSE_S: Final = 1.0
"""Least time between two reports, however much happens."""
LEAST_INTERVAL_S: Final = 0.1
"""Shortest interval that is kept to, whatever an answer asks for."""
CALL_TIMEOUT_S: Final = 20.0
"""Bound of one call: name server, connect, handshake, send, receive."""
LOOK_TIMEOUT_S: Final = 10.0
"""Bound of one look at storage. A file system that takes longer is reported as one that cannot be used."""
BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MOST_S: Final = 30.0
"""Longest pause between two calls while nobody answers: a controller that is back hears of its jobs within this."""
BACKOFF_JITTER: Final = 0.5
"""A pause is cut by up to this share, so that the jobs of a cluster do not all call at once when the controller is back."""
LAST_CALL_S: Final = 2.0
"""Bound of the report at the end. It is made only when there is something that the controller has not heard, and it answered
before: a Job's completion waits for it."""
LOG_AGAIN_S: Final = 300.0
"""How often the log repeats that nobody answers."""


class Reporter:
    """
    See the module.

    Raises:
        ValueError: the address or the certificates in the settings are none.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        own_settings = supervisor.settings
        self._supervisor = supervisor
        self._caller = transport.Transport(
            own_settings.home_url, ca=own_settings.home_ca, token_file=own_settings.token_file
        )
        self._listing = inventory.Inventory(own_settings.root, os.path.basename(own_settings.root.rstrip("/")))
        self._call = BlockingCaller("home")
        self._look = BlockingCaller("home-listing")
        self._news = asyncio.Event()
        self._reporting = asyncio.Lock()
        self._unheard = True
        """Something happened that the controller has not heard yet."""
        self._failed = 0
        self._interval_s = home.DEFAULT_INTERVAL_S
        self._logged: tuple[str, float] = ("", 0.0)
        self._commit: object = None
        supervisor.sidecar_status.listen(self._happened)

    def _happened(self) -> None:
        self._unheard = True
        self._news.set()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            self._expire()
            async with self._reporting:
                if report.speaks(self._supervisor):
                    await self._report(CALL_TIMEOUT_S)
            await self._pause()

    async def last(self) -> None:
        """Say what was not heard yet. Blocks: up to LAST_CALL_S; not at all while nobody answers."""
        if self._failed or not report.speaks(self._supervisor):
            return
        try:
            async with asyncio.timeout(LAST_CALL_S), self._reporting:
                if self._unheard:
                    await self._report(LAST_CALL_S)
        except TimeoutError:
            if self._unheard:
                _log.warning("the last report was not delivered within %.0f s", LAST_CALL_S)

    def close(self) -> None:
        """Let the threads end. Blocks: never."""
        self._call.close()
        self._look.close()

    async def _pause(self) -> None:
        if self._failed:
            longest = min(BACKOFF_FIRST_S * 2 ** (self._failed - 1), BACKOFF_MOST_S)
            await asyncio.sleep(longest * random.uniform(1 - BACKOFF_JITTER, 1))
            return
        await asyncio.sleep(min(NEWS_PAUSE_S, self._interval_s))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), max(0.0, self._interval_s - NEWS_PAUSE_S))

    def _expire(self) -> None:
        self._supervisor.sidecar_status.demands.expire(
            time.monotonic(), has_trainers=0 in self._supervisor.trainers.clients
        )

    async def _report(self, timeout_s: float) -> None:
        self._news.clear()
        self._unheard = False
        commit = self._supervisor.sidecar_status.commit
        storage = await self._storage(min(timeout_s, LOOK_TIMEOUT_S))
        if self._supervisor.sidecar_status.commit is not commit:
            # It came while we looked: a report that says so has it among its checkpoints.
            storage = await self._storage(min(timeout_s, LOOK_TIMEOUT_S))
        body = home.encode(report.make(self._supervisor, storage))
        try:
            answer = await self._call.run(lambda: self._caller.post(body), timeout_s)
        except (transport.CallFailed, TimeoutError, StillBusy) as err:
            self._unheard = True
            self._failed += 1
            self._log(str(err) or f"no answer within {timeout_s:.0f} s")
            return
        if self._failed:
            _log.info("the controller is reachable again after %d failed reports", self._failed)
        self._failed, self._logged = 0, ("", 0.0)
        self._interval_s = max(LEAST_INTERVAL_S, answer.interval_s)
        try:
            self._answered(answer)
        except Exception:  # a boundary: no answer may keep the next report from being made
            _log.exception("could not apply an answer of the controller")

    async def _storage(self, timeout_s: float) -> report.Storage:
        root = self._supervisor.settings.root
        if not root:
            return report.Storage()
        commit = self._supervisor.sidecar_status.commit
        stale = frozenset() if commit is None or commit is self._commit else frozenset({commit.step})
        try:
            checkpoints, problem = await self._look.run(lambda: self._listing.look(time.monotonic(), stale), timeout_s)
        except OSError as err:  # TimeoutError is one
            text = err.strerror or f"it did not answer within {timeout_s:.0f} s"
            return report.Storage(problem=f"the root {root} cannot be listed: {text}")
        except StillBusy:
            return report.Storage(problem=f"the root {root} does not answer")
        self._commit = commit
        return report.Storage(checkpoints=checkpoints, listed=True, problem=problem)

    def _answered(self, answer: home.Answer) -> None:
        supervisor = self._supervisor
        if answer.policy is not None:
            supervisor.policy.propose(answer.policy, answer.policy_generation)
        wanted = [each.id for each in answer.commands if each.kind == home.CommandKind.SAVE_NOW]
        demands = supervisor.sidecar_status.demands
        before = demands.acknowledgements()
        if demands.take(wanted, time.monotonic(), has_trainers=0 in supervisor.trainers.clients):
            _log.info("the controller requests a save now")
            supervisor.trainers.save_now()
        if demands.acknowledgements() != before:
            self._happened()

    def _log(self, reason: str) -> None:
        before, since_s = self._logged
        now_s = time.monotonic()
        if reason != before or now_s - since_s >= LOG_AGAIN_S:
            self._logged = (reason, now_s)
            _log.warning("cannot report to the controller: %s; saves are not affected", reason)
