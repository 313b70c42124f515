"""
The second half of a save that is on the local disks: every pod writes its share from its copy, and the coordinator commits it.

    coordinator:  publishes the copy that it uploads, the newest one that waits
    every pod:    maps its copy, and does from there on what `executor.save.persist` does with a slot

Called from: `executor.worker`, in a thread beside the other operations, with a context of its own (`session.open_beside`). Every pod of a job knows of
each held copy, so that all of them begin an upload at about the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable

from pillion import fault_points
from pillion.errors import RemoteFailure
from pillion.wire import home
from pillion_sidecar import channel
from pillion_sidecar.arena.slots import NO_SLOT
from pillion_sidecar.copies import disk
from pillion_sidecar.copies.head import Copy
from pillion_sidecar.executor.save import persist
from pillion_sidecar.executor.session import Context

_log = logging.getLogger(__name__)


def upload(context: Context, request: channel.Upload, say: Callable[[channel.UploadChosen], None]) -> channel.Persisted:
    """
    Bring one copy to storage.

    Args:
        context: see `session.open_beside`.
        request: what the supervisor knows.
        say: called when the copy is agreed on, before anything is written.

    Blocks: as `persist.persist`; peer_timeout_s for the coordinator's choice.

    Raises:
        SaveError: no checkpoint was made. Has the failures of every failed rank.
        exchange.StoreLost: see `session.with_failover`.
    """
    context.retention = request.retention
    chosen = _choose(context, request)
    say(channel.UploadChosen(number=request.number, copy=channel.LocalCopy(step=chosen.step, order=chosen.order)))
    fault_points.working_on(chosen.step)
    # A copy that an earlier session has left is older than whatever this session saves after its load.
    context.epoch = chosen.order[1] if chosen.order[0] == context.generation else 0
    started = time.monotonic()
    with contextlib.ExitStack() as opened:
        images, failures, save = _open(context, request, chosen, opened)
        outcome = persist.persist_images(context, save, _phase(request, chosen), images, failures, started)
    _note_stored(context, chosen)
    return dataclasses.replace(outcome, step=chosen.step)


def _open(
    context: Context, request: channel.Upload, chosen: Copy, opened: contextlib.ExitStack
) -> tuple[dict[int, disk.CopyImage], dict[int, RemoteFailure], channel.Persist]:
    """Return the images of this pod's ranks, or the failure of each rank; and the save as `persist` knows saves."""
    try:
        if context.disk is None:
            raise disk.LocalCopyLost("there is no local disk in this pod")
        head = context.disk.copies.head(context.first_rank, chosen)
        images = opened.enter_context(context.disk.copies.opened(chosen))
    except (disk.LocalCopyLost, OSError) as err:
        lost = RemoteFailure(disk.LocalCopyLost.__name__, str(err))
        # The other pods wait for this pod's part, and learn from it that there is none.
        return {}, dict.fromkeys(context.local_ranks, lost), _save(request, chosen)
    return images, {}, _save(request, chosen, started_ns=head.started_ns, cause=head.cause)


def _save(
    request: channel.Upload, chosen: Copy, *, started_ns: int = 0, cause: home.Cause = home.Cause.PERIODIC
) -> channel.Persist:
    """Return the save as `persist` knows saves. It has no slot."""
    return channel.Persist(
        step=chosen.step,
        slot=NO_SLOT,
        persist=True,
        retention=request.retention,
        repeated=request.repeated,
        started_ns=started_ns,
        cause=cause,
        run=request.run,
    )


def _phase(request: channel.Upload, chosen: Copy) -> str:
    # With the copy's name: pods that disagree on the copy wait for each other, and fail, and never mix two.
    return f"upload/{request.number}/{chosen.stem}"


def _choose(context: Context, request: channel.Upload) -> Copy:
    """Return the copy that all pods upload."""
    name = f"upload/{request.number}/choice"
    if context.coordinator and request.copy is not None:
        chosen = Copy(request.copy.order, request.copy.step)
        context.exchange.publish(name, {"step": chosen.step, "order": list(chosen.order)})
        # Whoever is in this upload has read the choices before the last one.
        context.exchange.unpublish([f"upload/{request.number - 2}/choice"])
        return chosen
    if request.copy is not None:
        return Copy(request.copy.order, request.copy.step)
    choice = context.exchange.receive(name, context.peer_timeout_s)
    return Copy((int(choice["order"][0]), int(choice["order"][1])), int(choice["step"]))


def _note_stored(context: Context, chosen: Copy) -> None:
    local_disk = context.disk
    if local_disk is None:
        return
    try:
        local_disk.copies.mark(chosen, disk.STORED)
        local_disk.copies.tidy()
    except OSError as err:
        _log.warning("could not note on the local disk that step %d is on storage: %s", chosen.step, err)
