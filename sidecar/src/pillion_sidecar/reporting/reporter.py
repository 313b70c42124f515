"""
Sends the reports of the coordinator's sidecar to the controller, and applies the answers.

    a report each interval_s, which the last answer has set; sooner after an event, but at most one in NEWS_PAUSE_S
    no answer: another report after a pause, which doubles up to MAX_BACKOFF_S; training never notices

Called from: `app`: `run` beside everything else, `last` at the end.
Must never: delay the drain by more than LAST_CALL_TIMEOUT_S, or end the event loop because of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import Final

from pillion.errors import SettingsError
from pillion.wire import home
from pillion_sidecar.concurrency.blocking import BlockingCaller, StillBusy
from pillion_sidecar.reporting import inventory, report, transport
from pillion_sidecar.supervisor.dispatcher import Supervisor

_log = logging.getLogger(__name__)

NEWS_PAUSE_S: Final = 1.0
"""Minimum time between two reports, however much happens."""
MIN_INTERVAL_S: Final = 0.1
"""Minimum interval of the reports, whatever an answer sets."""
CALL_TIMEOUT_S: Final = 20.0
"""Timeout for one call: name server, connect, handshake, send, receive."""
LOOK_TIMEOUT_S: Final = 10.0
"""Timeout for one look at the storage. A file system that takes longer is reported as unusable."""
FIRST_BACKOFF_S: Final = 1.0
"""Pause after the first call without an answer."""
MAX_BACKOFF_S: Final = 30.0
"""Maximum pause between two calls without an answer. A controller that is back gets all reports within this time."""
BACKOFF_JITTER: Final = 0.5
"""Maximum share by which a pause is shortened at random, so that the jobs of a cluster do not all call at once."""
LAST_CALL_TIMEOUT_S: Final = 2.0
"""Timeout for the report at the end, for which a Job's completion waits. It is sent only if something is unreported and the last call
succeeded."""
LOG_AGAIN_S: Final = 300.0
"""Interval at which the log repeats that the controller does not answer."""


class Reporter:
    """
    The reports of one sidecar. See the module.

    Args:
        supervisor: the state to report.

    Raises:
        ValueError: the URL or the certificates in the settings are invalid.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        own_settings = supervisor.settings
        self._supervisor = supervisor
        self._caller = transport.Transport(
            own_settings.home_url, ca=own_settings.home_ca, token_file=own_settings.token_file
        )
        self._listing: inventory.Inventory | None = None
        self._call = BlockingCaller("home")
        self._look = BlockingCaller("home-listing")
        self._news = asyncio.Event()
        self._reporting = asyncio.Lock()
        self._unreported = True
        """True if something has happened since the last successful report."""
        self._failed = 0
        self._interval_s = home.DEFAULT_INTERVAL_S
        self._logged: tuple[str, float] = ("", 0.0)
        self._commit: object = None
        supervisor.sidecar_status.listen(self._note_news)

    def _note_news(self) -> None:
        self._unreported = True
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
        """
        Send a last report, if something is unreported.

        Blocks: up to LAST_CALL_TIMEOUT_S. Not at all if the last call failed.
        """
        if self._failed or not report.speaks(self._supervisor):
            return
        try:
            async with asyncio.timeout(LAST_CALL_TIMEOUT_S), self._reporting:
                if self._unreported:
                    await self._report(LAST_CALL_TIMEOUT_S)
        except TimeoutError:
            if self._unreported:
                _log.warning("the last report was not delivered within %.0f s", LAST_CALL_TIMEOUT_S)

    def close(self) -> None:
        """Let the threads end. Blocks: never."""
        self._call.close()
        self._look.close()

    async def _pause(self) -> None:
        if self._failed:
            longest = min(FIRST_BACKOFF_S * 2 ** (self._failed - 1), MAX_BACKOFF_S)
            await asyncio.sleep(longest * random.uniform(1 - BACKOFF_JITTER, 1))
            return
        await asyncio.sleep(min(NEWS_PAUSE_S, self._interval_s))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), max(0.0, self._interval_s - NEWS_PAUSE_S))

    def _expire(self) -> None:
        self._supervisor.sidecar_status.save_requests.expire(
            time.monotonic(), has_trainers=0 in self._supervisor.trainers.clients
        )

    async def _report(self, timeout_s: float) -> None:
        self._news.clear()
        self._unreported = False
        commit = self._supervisor.sidecar_status.commit
        storage = await self._storage(min(timeout_s, LOOK_TIMEOUT_S))
        if self._supervisor.sidecar_status.commit is not commit:
            # A commit came during the look. A report of a commit must have it in its list of checkpoints.
            storage = await self._storage(min(timeout_s, LOOK_TIMEOUT_S))
        body = home.encode(report.make(self._supervisor, storage))
        try:
            answer = await self._call.run(lambda: self._caller.post(body), timeout_s)
        except (transport.CallFailed, TimeoutError, StillBusy) as err:
            self._unreported = True
            self._failed += 1
            self._log(str(err) or f"no answer within {timeout_s:.0f} s")
            return
        if self._failed:
            _log.info("the controller is reachable again after %d failed reports", self._failed)
        self._failed, self._logged = 0, ("", 0.0)
        self._interval_s = max(MIN_INTERVAL_S, answer.interval_s)
        try:
            self._apply(answer)
            await self._pin(answer, min(timeout_s, LOOK_TIMEOUT_S))
        except Exception:  # a boundary: an answer must not prevent the next report
            _log.exception("could not apply an answer of the controller")

    async def _pin(self, answer: home.Answer, timeout_s: float) -> None:
        """Set and remove the pins of an answer. What fails comes again with the next answer. Blocks: up to `timeout_s`."""
        pin = [each.step for each in answer.commands if each.kind == home.CommandKind.PIN and each.step >= 0]
        unpin = [each.step for each in answer.commands if each.kind == home.CommandKind.UNPIN and each.step >= 0]
        listing = self._listing
        if not (pin or unpin) or listing is None:
            return
        try:
            await self._look.run(lambda: listing.pin(pin, unpin), timeout_s)
        except (OSError, StillBusy) as err:
            _log.warning(
                "pins of the cluster for the steps %s could not be changed, and are tried again: %s",
                [*pin, *unpin],
                err,
            )
            return
        self._note_news()

    async def _storage(self, timeout_s: float) -> report.Storage:
        root = self._supervisor.settings.root
        if not root:
            return report.Storage()
        if self._listing is None:
            try:
                self._listing = inventory.Inventory(self._supervisor.open_root(root))
            except SettingsError as err:
                return report.Storage(problem="; ".join(err.problems))
        listing, commit = self._listing, self._supervisor.sidecar_status.commit
        stale = frozenset() if commit is None or commit is self._commit else frozenset({commit.step})
        try:
            checkpoints, problem = await self._look.run(lambda: listing.look(time.monotonic(), stale), timeout_s)
        except OSError as err:  # TimeoutError is one
            text = err.strerror or f"it did not answer within {timeout_s:.0f} s"
            return report.Storage(problem=f"the root {root} cannot be listed: {text}")
        except StillBusy:
            return report.Storage(problem=f"the root {root} does not answer")
        self._commit = commit
        return report.Storage(checkpoints=checkpoints, listed=True, problem=problem)

    def _apply(self, answer: home.Answer) -> None:
        supervisor = self._supervisor
        if answer.policy is not None:
            supervisor.policy.propose(answer.policy, answer.policy_generation)
        request_ids = [command.id for command in answer.commands if command.kind == home.CommandKind.SAVE_NOW]
        save_requests = supervisor.sidecar_status.save_requests
        before = save_requests.acknowledgements()
        if save_requests.take(request_ids, time.monotonic(), has_trainers=0 in supervisor.trainers.clients):
            _log.info("the controller requests a save now")
            supervisor.trainers.save_now()
        if save_requests.acknowledgements() != before:
            self._note_news()

    def _log(self, reason: str) -> None:
        before, since_s = self._logged
        now_s = time.monotonic()
        if reason != before or now_s - since_s >= LOG_AGAIN_S:
            self._logged = (reason, now_s)
            _log.warning("cannot report to the controller: %s; saves are not affected", reason)
