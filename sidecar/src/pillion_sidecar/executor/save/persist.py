"""
One save, from sealed slots to a committed checkpoint. Called from: `executor.worker`, one save at a time.

    every pod:    read slots -> post "plan"            digests of the layouts, lengths of the opaque leaves
    coordinator:  collect, make or reuse the plan, publish
    every pod:    frame, write and digest its share, write its part, post "result"
    coordinator:  collect, fence, publish manifest and .metadata, publish the outcome, apply retention (`executor.save.commit`)
    every pod:    receive the outcome; write again if storage has failed

A failure on any rank is a document in the same phases. So every pod ends the save with the same failures.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import time
from collections.abc import Mapping
from concurrent import futures
from typing import Any

from pillion import fault_points
from pillion.errors import BarrierTimeout, CommitError, ErrorDocument, RemoteFailure
from pillion.wire import layout
from pillion_sidecar import channel
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import catalog, commit, milestones
from pillion_sidecar.executor import agreements
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange import failures as failures_module
from pillion_sidecar.executor.save import commit as commit_module
from pillion_sidecar.executor.save import hold
from pillion_sidecar.executor.save.write import PodWriter, folder_of, generation_of
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage.folder import Folder

_log = logging.getLogger(__name__)


def persist(context: Context, request: channel.Persist) -> channel.Persisted:
    """
    Run one save.

    Blocks: peer_timeout_s for each agreement, persist_timeout_s for the peers' writes, commit.RETRY_AFTER_S between attempts.

    Raises:
        SaveError: no checkpoint was made. Has the failures of every failed rank.
        exchange.StoreLost: see `context.with_failover`.
    """
    fault_points.working_on(request.step)
    phase = phase_of(context, request.step, persist=request.persist, rescued=request.rescued)
    started = time.monotonic()
    # No peer waits for this pod's part of a save that is already complete: there are no peers, or they check for a complete save as well.
    alone = len(context.pods) == 1 and request.repeated
    if request.persist and (context.store_lost or alone):
        outcome = _found_complete(context, request)
        if outcome is not None:
            return outcome
    slot_images, failures = read_slots(context, request)
    if not request.local:
        return persist_images(context, request, phase, slot_images, failures, started)
    plan = _agree(context, request, phase, slot_images, failures)
    unheld = hold.hold(context, request, phase, slot_images)
    if unheld:
        _log.error("step %d goes on without the local disks: %s", request.step, unheld)
    if not unheld or not request.persist:
        order = (context.generation, context.epoch)
        return channel.Persisted(held=not unheld, unheld=unheld, persist_s=time.monotonic() - started, order=order)
    outcome = _write(context, request, phase, slot_images, plan, started)
    return dataclasses.replace(outcome, unheld=unheld)


def persist_images(
    context: Context,
    request: channel.Persist,
    phase: str,
    images: Mapping[int, image.Image],
    failures: Mapping[int, RemoteFailure],
    started: float,
) -> channel.Persisted:
    """
    Agree on the plan, write this pod's share and commit it; for a save that stays in memory only agree.

    Args:
        context, request: as in `persist`.
        phase: name of this save in the exchange; no other save has it.
        images: rank -> what is written.
        failures: of local ranks that have nothing to write.
        started: when the save began to be persisted, monotonic seconds.

    Raises: as `persist`.
    """
    plan = _agree(context, request, phase, images, failures)
    if not request.persist:
        return channel.Persisted(persist_s=time.monotonic() - started)
    return _write(context, request, phase, images, plan, started)


def _write(
    context: Context,
    request: channel.Persist,
    phase: str,
    images: Mapping[int, image.Image],
    plan: plan_module.Plan,
    started: float,
) -> channel.Persisted:
    """Write this pod's share until the coordinator has committed the save or has given it up."""
    share = PodWriter(context, request, plan)
    result: dict[str, Any] = {}
    metadata: futures.Future[bytes] | None = None
    attempt = 0
    with futures.ThreadPoolExecutor(1, "pillion-metadata") as pool:
        if context.coordinator:
            # Runs during the writes: a hundred thousand tensors take seconds, and the coordinator waits for its disk anyway.
            metadata = pool.submit(commit_module.metadata_of, context, request, phase, plan)
        while True:
            at = f"{phase}/{attempt}"
            if result.get("failures", True):
                result = share.write(images)
            durable = time.monotonic()
            fault_points.reach(fault_points.FaultPoint.REPORT, path=share.folder.path or "")
            context.exchange.post(f"{at}/result", result)
            if metadata is not None:
                # Its own outcome, which it need not ask the store for: the store answers every other pod first.
                outcome = commit_module.conclude(context, request, phase, plan, share, metadata, attempt=attempt)
            else:
                outcome = context.exchange.receive(f"{at}/outcome", context.persist_timeout_s)
            if outcome.get("again_s") is None:
                break
            _log.warning(
                "writing step %d is retried in %.0f s: %s", request.step, outcome["again_s"], outcome["failures"]
            )
            time.sleep(float(outcome["again_s"]))
            attempt += 1
    if outcome.get("discarded"):
        share.discard()
    failures_module.raise_told(outcome, request.step)
    commit_s = time.monotonic() - durable
    persisted = channel.Persisted(
        path=str(share.folder),
        size_bytes=int(outcome["size_bytes"]),
        persist_s=durable - started,
        commit_s=commit_s,
        order=(context.generation, context.epoch),
        differing=tuple(outcome.get("differing", ())),
    )
    if context.coordinator:
        commit_module.note(context, request, share, persisted)
    return persisted


def _found_complete(context: Context, request: channel.Persist) -> channel.Persisted | None:
    """
    Return the outcome of a save that is already committed, or complete on storage; None: it is neither.

    A lost store or a dead executor leaves such a save. Called from: any pod. The pod that finds the save complete commits it.
    """
    folder = folder_of(context, request)
    own_generation = generation_of(context, request)
    try:
        if not commit.is_committed_as(folder, own_generation):
            if context.root is not None:
                commit.fence(context.root, context.generation)
            if commit.finish(folder, generation=own_generation, over_strangers=request.destination is not None) is None:
                return None
            _log.warning("step %d was written completely by an earlier process: committed it now", request.step)
            if context.root is not None and request.destination is None:
                milestones.remember(context.root, request.step, own_generation, request.run)
        size_bytes = catalog.size_bytes(folder)
    except (OSError, CommitError):
        return None
    order = (context.generation, context.epoch)
    return channel.Persisted(path=str(folder), size_bytes=size_bytes, persist_s=0.0, order=order)


def withdraw(context: Context, step: int, error: ErrorDocument, *, persist: bool, rescued: bool = False) -> None:
    """
    End the save of `step` on every pod, because this pod has no part in it. So no pod waits for the timeout.

    Raises:
        SaveError: always. Has the failures that every pod now knows.
    """
    phase = phase_of(context, step, persist=persist, rescued=rescued)
    local = {rank: RemoteFailure(error.kind, error.message) for rank in context.local_ranks}
    failures = {rank: failure for rank, failure in error.failures.items() if rank in local} or local
    documents = failures_module.documents(failures)
    if persist:
        # If a pod gives up in the middle (its storage hangs), the coordinator waits for its result. If it is the coordinator, all wait for the
        # outcome.
        for attempt in range(len(commit_module.RETRY_AFTER_S) + 1):
            context.exchange.post(f"{phase}/{attempt}/result", {"failures": documents})
            if context.coordinator:
                context.exchange.publish(f"{phase}/{attempt}/outcome", {"failures": documents})
    context.exchange.post(f"{phase}/plan", {"failures": documents, "ranks": {}})
    if context.coordinator:
        _publish_decision(context, phase, persist=persist)
    failures_module.raise_told(context.agreed.decision(context.exchange, phase, context.peer_timeout_s * 2), step)


def check_destination(context: Context, request: channel.Persist) -> None:
    """
    End a save on every pod if it must not be written to its destination.

    Raises:
        SaveError: the checkpoint exists and may not be overwritten. Or a new sidecar has found the save in the arena, and only the sidecar
            before it knew the destination.
    """
    destination = request.destination
    problem: Exception | None = None
    if request.persist and destination is None:
        if context.root is None:
            problem = LookupError(f"where step {request.step} was to go went with the sidecar that was told it")
        elif why := _in_the_way(context.step_folder(request.step)):
            problem = FileExistsError(errno.EEXIST, why, str(context.step_folder(request.step)))
    elif destination is not None and destination.path is not None and not destination.overwrite:
        folder = context.open_folder(destination.path)
        own_generation = generation_of(context, request)
        # The successor of a dead executor repeats its save, which may be committed already.
        if _holds_another(folder, own_generation):
            problem = RuntimeError(f"Checkpoint already exists and overwrite=False: {folder}")
    if problem is not None:
        failures = dict.fromkeys(context.local_ranks, failures_module.of_exception(problem))
        withdraw(context, request.step, ErrorDocument("PersistError", str(problem), failures), persist=True)


def _in_the_way(folder: Folder) -> str:
    """Return why a step cannot be saved into its folder of the root; empty: no reason is known. An error of storage shows at the write."""
    try:
        return folder.obstacle() or (commit.STRANGERS if commit.is_strangers(folder) else "")
    except OSError:
        return ""


def _holds_another(folder: Folder, generation: str) -> bool:
    """Whether a folder holds a checkpoint of another save. An error of storage shows at the write."""
    try:
        return commit.is_committed(folder) and commit.committed_as(folder) != generation
    except OSError:
        return False


def phase_of(context: Context, step: int, *, persist: bool, rescued: bool = False) -> str:
    # The same step is saved again after a load of an older one, and after a rescue of its snapshot. Each save needs keys of its own.
    # Every pod counts the same loads.
    kind = "rescued" if rescued else "save" if persist else "snapshot"
    return f"{kind}/{context.epoch}/{step}"


# --- agreeing on the plan --------------------------------------------------------------------------------------------


def read_slots(
    context: Context, request: channel.Persist
) -> tuple[dict[int, image.SlotImage], dict[int, RemoteFailure]]:
    slot_images: dict[int, image.SlotImage] = {}
    failures: dict[int, RemoteFailure] = {}
    for rank in context.local_ranks:
        try:
            slot_images[rank] = context.reader.read(context.segments[rank], request.slot, step=request.step)
        except image.TornSlot as err:
            failures[rank] = failures_module.of_exception(err)
    return slot_images, failures


def _agree(
    context: Context,
    request: channel.Persist,
    phase: str,
    images: Mapping[int, image.Image],
    failures: Mapping[int, RemoteFailure],
) -> plan_module.Plan:
    fault_points.reach(fault_points.FaultPoint.PLAN)
    if context.not_shared:
        failures = {
            **dict.fromkeys(context.local_ranks, RemoteFailure("RootNotShared", context.not_shared)),
            **failures,
        }
    document: dict[str, Any] = {
        "failures": failures_module.documents(failures),
        "ranks": {str(r): [p.layout.digest, p.opaque_lengths] for r, p in images.items()},
    }
    publish_layouts(context, images)
    context.exchange.post(f"{phase}/plan", document)
    if context.coordinator:
        _rise_above(context, request)
        cut = _object_bytes(context, request)
        decision = _publish_decision(context, phase, persist=request.persist, object_bytes=cut)
        context.agreed.hear(decision)
    else:
        # The coordinator waits this long for its peers, and decides only then.
        decision = context.agreed.decision(context.exchange, phase, context.peer_timeout_s * 2)
    context.generation = max(context.generation, int(decision["generation"]))
    cut_bytes = decision.get("object_bytes")
    context.object_bytes = None if cut_bytes is None else int(cut_bytes)
    failures_module.raise_told(decision, request.step)
    plan_id = str(decision["plan_id"])
    if not request.persist:
        return plan_module.Plan(plan_id, {}, {})
    plan = context.agreed.plan(plan_id)
    if plan is None:
        document = context.exchange.receive(agreements.plan_name(plan_id), context.peer_timeout_s)
        plan = plan_module.Plan.from_document(document)
    context.agreed.remember(plan)
    return plan


def _rise_above(context: Context, request: channel.Persist) -> None:
    """
    (coordinator) Raise this session's generation above all generations in the save's folder, if the job has no root.

    Without a root generations are times. A session whose clock was ahead would otherwise fence off its folder for all later sessions.
    """
    if context.root is not None or not request.persist:
        return
    folder = folder_of(context, request)
    context.watch.storage(f"look into {folder}")
    try:
        lies = commit.newest_written(folder)
    except OSError as err:
        _log.warning("cannot list %s before the write: %s", folder, err)
        return
    finally:
        context.watch.idle()
    if lies > context.generation:
        _log.warning("%s was written by a newer session, or under a clock that is ahead: its files are removed", folder)
        context.generation = lies + 1


def _object_bytes(context: Context, request: channel.Persist) -> int | None:
    """(coordinator) Return the size at which every pod cuts the files of this save; None: no cuts, or no files."""
    return folder_of(context, request).object_bytes if request.persist else None


def publish_layouts(context: Context, images: Mapping[int, image.Image]) -> None:
    """
    Publish this pod's layouts for the other pods, each under its digest.

    An unchanged layout costs nothing, and a coordinator's successor finds the layouts again.
    """
    for slot_layout in (each.layout for each in images.values()):
        if slot_layout.digest not in context.agreed.layouts:
            context.exchange.publish(
                agreements.layout_name(slot_layout.digest), {"layout": slot_layout.encoded.decode()}
            )
            context.agreed.layouts[slot_layout.digest] = slot_layout


def find_layout(context: Context, digest: str) -> layout.Layout:
    """
    (coordinator) Return a layout that a pod has published.

    Raises:
        BarrierTimeout: no pod has published it within peer_timeout_s.
    """
    cached = context.agreed.layouts.get(digest)
    if cached is None:
        document = context.exchange.receive(agreements.layout_name(digest), context.peer_timeout_s)
        cached = context.agreed.layouts[digest] = layout.decode(str(document["layout"]).encode())
    return cached


def _publish_decision(
    context: Context, phase: str, *, persist: bool, object_bytes: int | None = None
) -> dict[str, Any]:
    """(coordinator) Decide, and publish the decision to every pod. Return it."""
    gone: list[str] = []
    try:
        decision = _decide(context, phase, gone, persist=persist)
    except BarrierTimeout as err:
        # A late pod still reads the decision. It is deleted when all pods have come to another save.
        context.finished_phases += [f"{phase}/plan", *_results(phase)]
        decision = {
            "failures": failures_module.documents(failures_module.of_missing(err)),
            "phase": err.phase,
            "waited_s": err.waited_s,
        }
    except plan_module.PlanError as err:
        decision = {
            "failures": failures_module.documents({rank: failures_module.of_exception(err) for rank in err.ranks})
        }
    decision |= {"generation": context.generation, "object_bytes": object_bytes, **context.agreed.notice()}
    context.exchange.publish(f"{phase}/plan", decision)
    # Every pod waits for the decision, so this follows it.
    context.exchange.unpublish(gone)
    return decision


def _results(phase: str) -> list[str]:
    """Return the phases under which a pod that withdraws posts its results, one for each attempt."""
    return [f"{phase}/{attempt}/result" for attempt in range(len(commit_module.RETRY_AFTER_S) + 1)]


def _decide(context: Context, phase: str, gone: list[str], *, persist: bool) -> dict[str, Any]:
    """(coordinator) Return the plan for these layouts, or the failures of all pods. `gone` gets the names to unpublish."""
    documents = context.exchange.collect(f"{phase}/plan", context.peer_timeout_s)
    # Every pod is here, so every pod has left the save before. Its keys can be deleted.
    context.forget_finished()
    context.finished_phases.append(f"{phase}/plan")
    failures = failures_module.collect(documents)
    digests = {int(rank): str(entry[0]) for document in documents.values() for rank, entry in document["ranks"].items()}
    # Also for a save that fails: its published layouts must be deleted some day.
    gone += context.agreed.settle(digests)
    if failures:
        # A pod that withdrew has posted its results too.
        context.finished_phases += _results(phase)
        return {"failures": failures_module.documents(failures)}
    plan_id = plan_module.plan_id(digests)
    if persist and context.agreed.plan(plan_id) is None:
        plan = plan_module.make_plan({rank: find_layout(context, digest) for rank, digest in digests.items()})
        context.exchange.publish(agreements.plan_name(plan_id), plan.to_document())
        context.agreed.remember(plan)
    return {"failures": {}, "plan_id": plan_id}
