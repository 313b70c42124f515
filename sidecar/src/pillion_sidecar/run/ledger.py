"""
The ledger of this sidecar: collects the facts of the run's journal while trainers run. No I/O; the clock is an argument.

Called from: `status.status` (saves, loads), the supervisor (sessions, ends). Owns: the journal in this process. Only the coordinator's is written.
Must never: grow without a limit, or raise into what it watches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from pillion_sidecar.run import journal as journal_module
from pillion_sidecar.run.journal import Attempt, Journal, Load, Save

KEPT_ATTEMPTS: Final = 16
"""Maximum ended attempts of this sidecar that are kept until the journal on the root has them. There are more only if trainers die this often before an
executor could open their session."""
UNCLAIMED: Final = 0
"""Number of an attempt that has not claimed the root yet."""


class Ledger:
    """
    See the module.

    Args:
        wall: returns seconds since 1970.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._journal = Journal()
        self._now: Attempt | None = None
        self._ended: list[Attempt] = []
        """Ended attempts of this sidecar, which the journal on the root may not have yet."""
        self._loading_ns = 0
        self._coordinator = False

    def _now_ns(self) -> int:
        return int(self._wall() * 1e9)

    def _change(self, **changes: Any) -> None:
        if self._now is not None:
            self._now = replace(self._now, **changes)

    # --- attempts ----------------------------------------------------------------------------------------------------

    def begin(self, session: str, *, world_size: int, num_pods: int, coordinator: bool) -> None:
        """Note that trainers of a session are here. The first call for a session begins an attempt."""
        if self._now is not None and self._now.session == session:
            # Trainers that come back to a restarted sidecar have not ended.
            self._change(ended="", seen_ns=self._now_ns())
            return
        self.ended(journal_module.DIED)
        if self._now is not None and self._now.number != UNCLAIMED:
            self._ended = [*self._ended, self._now][-KEPT_ATTEMPTS:]
        now_ns = self._now_ns()
        self._coordinator, self._loading_ns = coordinator, 0
        self._now = Attempt(
            number=UNCLAIMED,
            session=session[: journal_module.TEXT_CHARS],
            world_size=world_size,
            num_pods=num_pods,
            began_ns=now_ns,
            seen_ns=now_ns,
        )

    def opened(self, session: str, number: int, document: object, seen_ns: int) -> None:
        """
        Note that the session owns the root.

        Args:
            number: its number there.
            document: the journal on the root, as the executor has read it.
            seen_ns: last sign of life of the session with the number before. 0: not known.
        """
        attempt = self._now
        if attempt is None or attempt.session != session or attempt.number == number:
            return  # of an older session, or a new executor of this one
        journal = journal_module.read(document)
        before = next((each for each in journal.attempts if each.number == number - 1), None)
        if before is not None and not before.ended and seen_ns > before.seen_ns:
            journal = journal_module.with_attempt(journal, replace(before, seen_ns=seen_ns))
        for each in self._ended:
            journal = journal_module.with_attempt(journal, each)
        own = next((each for each in journal.attempts if each.number == number), None)
        self._now = replace(attempt, number=number) if own is None else _continued(own, attempt)
        self._journal = journal

    def ended(self, how: str) -> None:
        """Note that the trainers have ended. Later calls do not count."""
        if self._now is not None and not self._now.ended:
            self._change(ended=how, seen_ns=self._now_ns())

    # --- loads -------------------------------------------------------------------------------------------------------

    def loading(self) -> None:
        """Note that every local rank has asked to load."""
        self._loading_ns = self._now_ns()

    def loaded(self, step: int | None, tier: str, saved_ns: int, refused: int) -> None:
        """Note that a load has ended well. `saved_ns`: when the save of what was loaded began. 0: not known."""
        if self._now is None:
            return
        now_ns = self._now_ns()
        load = Load(
            step=-1 if step is None else step,
            tier=tier,
            began_ns=self._loading_ns or now_ns,
            ended_ns=now_ns,
            saved_ns=saved_ns or self._saved_ns(step),
        )
        loads = (*self._now.loads, load)
        if len(loads) > journal_module.MAX_LOADS:  # the first one, with which the attempt began, stays
            loads = (loads[0], *loads[2:])
        self._change(loads=loads, refused=self._now.refused + refused)

    def _saved_ns(self, step: int | None) -> int:
        return next((each.began_ns for each in reversed(self._journal.saves) if each.step == step), 0)

    # --- saves -------------------------------------------------------------------------------------------------------

    def stalled(self, stall_s: float, waited_s: float) -> None:
        """Note that a save held up training for `stall_s`, and of these for `waited_s` because no slot was free."""
        if self._now is not None:
            waited_s = min(waited_s, stall_s)
            self._change(
                stalled_s=round(self._now.stalled_s + stall_s - waited_s, 6),
                waited_s=round(self._now.waited_s + waited_s, 6),
            )

    def failed(self) -> None:
        if self._now is not None:
            self._change(failed=self._now.failed + 1)

    def dropped(self) -> None:
        if self._now is not None:
            self._change(dropped=self._now.dropped + 1)

    def snapshot(self) -> None:
        if self._now is not None:
            self._change(snapshots=self._now.snapshots + 1)

    def pending(self, save: Save) -> dict[str, object] | None:
        """Return the journal with a save that is about to be committed. None: this sidecar does not write it, or not yet."""
        journal = self.journal()
        if journal is None or self._now is None or not self._coordinator:
            return None
        return journal_module.with_save(journal, replace(save, number=self._now.number)).to_document()

    def committed(self, save: Save) -> None:
        """Note that a save is committed."""
        if self._now is None:
            return
        self._journal = journal_module.with_save(self._journal, replace(save, number=self._now.number))
        self._now = journal_module.counted(self._now, save)

    # --- reading -----------------------------------------------------------------------------------------------------

    def journal(self) -> Journal | None:
        """
        Return the journal as of now. Any thread may call it, as nothing is changed.

        Returns:
            None: the session does not own the root yet, so that earlier attempts are not known.
        """
        now = self._now
        if now is None or now.number == UNCLAIMED:
            return None
        if not now.ended:
            now = replace(now, seen_ns=self._now_ns())
        return journal_module.with_attempt(self._journal, now)


def _continued(own: Attempt, since: Attempt) -> Attempt:
    """Return an attempt that an earlier sidecar has begun, with what this one has seen of it since. Pure."""
    return replace(
        since,
        number=own.number,
        began_ns=min(own.began_ns, since.began_ns),
        loads=(*own.loads, *since.loads),
        stalled_s=own.stalled_s + since.stalled_s,
        waited_s=own.waited_s + since.waited_s,
        saves=own.saves + since.saves,
        failed=own.failed + since.failed,
        dropped=own.dropped + since.dropped,
        snapshots=own.snapshots + since.snapshots,
        bytes=own.bytes + since.bytes,
        persist_s=own.persist_s + since.persist_s,
        refused=own.refused + since.refused,
    )
