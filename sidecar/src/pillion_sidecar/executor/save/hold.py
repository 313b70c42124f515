"""
The local half of a save: every pod writes a copy to its own node's disk, and the pods agree that all of them have it.

    every pod:    writes the copy of its ranks, posts "local"
    coordinator:  collects, publishes "held": whether every pod has it, or which pods do not, and why
    every pod:    marks the copy as held; or removes it, and the save goes on without local disks

From then on the save outlives the trainers, and on most clusters the pod. `executor.save.upload` brings it to storage.

Called from: `executor.save.persist`. No failure of a local disk fails a save.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pillion.errors import BarrierTimeout
from pillion_sidecar import channel
from pillion_sidecar.arena import image
from pillion_sidecar.copies import disk
from pillion_sidecar.copies.head import Copy
from pillion_sidecar.executor.local_disk import FULL, LocalDisk
from pillion_sidecar.executor.session import Context
from pillion_sidecar.waits import WaitKind

_log = logging.getLogger(__name__)


def hold(context: Context, request: channel.Persist, phase: str, slot_images: Mapping[int, image.SlotImage]) -> str:
    """
    Write this pod's copy, and agree with the other pods that all have one.

    Returns:
        Why not every pod has a copy. Empty: every pod has one.

    Blocks: local_disk.SILENT_S for a disk that does not answer; persist_timeout_s for the slowest pod.
    """
    copy = Copy((context.generation, context.epoch), request.step)
    problem = _write(context, request, copy, slot_images)
    context.exchange.post(f"{phase}/local", {"problem": problem})
    if context.coordinator:
        _publish_outcome(context, phase)
    outcome = context.exchange.receive(f"{phase}/held", context.persist_timeout_s * 2)
    why = str(outcome["why"])
    local_disk = context.disk
    if local_disk is not None and not problem:
        try:
            local_disk.run(lambda: _conclude(local_disk, copy, held=not why))
        except OSError as err:
            # The copy stays what it is for the other pods. This pod's mark is only for its own next sidecar.
            _log.warning("could not note on the local disk that step %d is held: %s", request.step, err)
    return why


def _write(context: Context, request: channel.Persist, copy: Copy, slot_images: Mapping[int, image.SlotImage]) -> str:
    """Write the copy. Return why it is not there; empty: it is."""
    local_disk = context.disk
    if local_disk is None:
        return "there is no local disk in this pod"
    if local_disk.problem:
        return local_disk.problem
    about = disk.About(
        run_id=context.run_id, wanted=request.persist, started_ns=request.started_ns, cause=request.cause
    )

    def write() -> None:
        local_disk.copies.tidy()
        while True:
            try:
                local_disk.copies.write(
                    copy, slot_images, about, num_threads=context.write_threads, on_progress=local_disk.moved
                )
                return
            except OSError as err:
                if err.errno not in FULL or not local_disk.copies.make_room():
                    raise

    context.watch.begins(WaitKind.STORAGE, f"write the local copy of step {request.step}", context.persist_timeout_s)
    try:
        local_disk.run(write)
    except OSError as err:
        return f"{err.strerror or err} ({err.filename or local_disk.copies.directory})"
    finally:
        context.watch.idle()
    return ""


def _publish_outcome(context: Context, phase: str) -> None:
    """(coordinator) Collect what the pods say, and publish whether all of them have a copy."""
    try:
        documents = context.exchange.collect(f"{phase}/local", context.persist_timeout_s)
        problems = {first: str(document["problem"]) for first, document in documents.items() if document["problem"]}
    except BarrierTimeout as err:
        problems = dict.fromkeys(err.missing, f"did not end its write within {err.waited_s:.0f} s")
    pods = {pod[0]: pod for pod in context.pods}
    why = "; ".join(
        f"ranks {list(pods.get(first, (first,)))}: {problem}" for first, problem in sorted(problems.items())
    )
    context.finished_phases.append(f"{phase}/local")
    context.finished_names.append(f"{phase}/held")
    context.exchange.publish(f"{phase}/held", {"why": why})


def _conclude(local_disk: LocalDisk, copy: Copy, *, held: bool) -> None:
    if held:
        local_disk.copies.mark(copy, disk.HELD)
    else:
        local_disk.copies.remove([copy])


def adopt(context: Context) -> list[channel.LocalCopy]:
    """Return the held copies of this session that still have to go to storage, oldest first. Never raises."""
    local_disk = context.disk
    if local_disk is None or local_disk.problem:
        return []

    def look() -> list[Copy]:
        found = local_disk.copies.copies()
        return [
            copy
            for copy, marks in found.items()
            if copy.order[0] == context.generation
            and marks.held
            and not marks.stored
            and local_disk.copies.head(context.first_rank, copy).wanted
        ]

    try:
        return [channel.LocalCopy(step=copy.step, order=copy.order) for copy in local_disk.run(look)]
    except (OSError, ValueError) as err:
        _log.warning("cannot look for copies on the local disk: %s", err)
        return []
