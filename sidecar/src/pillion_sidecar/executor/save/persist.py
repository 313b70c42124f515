"""
One save, from sealed slots to a committed checkpoint. Called from: `executor.worker`, one at a time.

    every pod:    read slots -> post "plan"            digests of the layouts, lengths of the opaque leaves
    coordinator:  collect, make or reuse the plan, publish
    every pod:    frame, write and digest its share, write its part file, post "result"
    coordinator:  collect, fence, publish manifest and .metadata, publish the outcome, apply retention (`executor.save.commit`)
    every pod:    receive the outcome; write again what storage refused

A failure on any rank travels as a document through the same phases, so that every pod ends the save with the same failures.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Mapping
from concurrent import futures
from typing import Any

from pillion import fault_points
from pillion.errors import BarrierTimeout, CommitError, ErrorDocument, RemoteFailure
from pillion.wire import layout, names
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import catalog, commit, milestones
from pillion_sidecar.executor import agreements
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange import failures as failures_module
from pillion_sidecar.executor.save import commit as commit_module
from pillion_sidecar.executor.save.request import Request
from pillion_sidecar.executor.save.write import PodWriter, directory_of, generation_of
from pillion_sidecar.executor.session import Context

_log = logging.getLogger(__name__)


def persist(context: Context, request: Request) -> dict[str, Any]:
    """
    Run one save.

    Blocks: peer_timeout_s for each agreement, persist_timeout_s for the peers' writes, conclude.RETRY_AFTER_S between attempts.

    Returns:
        The outcome: path, size_bytes, persist_s, commit_s.

    Raises:
        SaveError: with the failures of every failed rank; no checkpoint was made.
        exchange.StoreLost: see `context.with_failover`.
    """
    fault_points.working_on(request.step)
    phase = phase_of(context, request.step, persist=request.persist, rescued=request.rescued)
    started = time.monotonic()
    # Nobody waits for this pod's part of what is found complete: there are no others, or they look for it as well.
    alone = len(context.pods) == 1 and request.repeated
    if request.persist and (context.store_lost or alone):
        outcome = _found_complete(context, request)
        if outcome is not None:
            return outcome
    slot_images, failures = read_slots(context, request)
    plan = _agree(context, request, phase, slot_images, failures)
    if not request.persist:
        return {"path": "", "size_bytes": 0, "persist_s": time.monotonic() - started, "commit_s": 0.0}
    return _write(context, request, phase, slot_images, plan, started)


def _write(
    context: Context,
    request: Request,
    phase: str,
    slot_images: Mapping[int, image.SlotImage],
    plan: plan_module.Plan,
    started: float,
) -> dict[str, Any]:
    """Write this pod's share until the coordinator has committed the save, or given it up."""
    share = PodWriter(context, request, plan)
    result: dict[str, Any] = {}
    metadata: futures.Future[bytes] | None = None
    attempt = 0
    with futures.ThreadPoolExecutor(1, "pillion-metadata") as pool:
        if context.coordinator:
            # Beside the writing: a hundred thousand tensors take seconds, and the coordinator waits for its disk anyway.
            metadata = pool.submit(commit_module.metadata_of, context, request, phase, plan)
        while True:
            at = f"{phase}/{attempt}"
            if result.get("failures", True):
                result = share.write(slot_images)
            durable = time.monotonic()
            fault_points.reach(fault_points.FaultPoint.REPORT, path=share.directory)
            context.exchange.post(f"{at}/result", result)
            if metadata is not None:
                commit_module.conclude(context, request, phase, plan, share.directory, metadata, attempt=attempt)
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
    if context.coordinator:
        commit_module.forget_older(context, request, share.directory)
    return {
        "path": share.directory,
        "size_bytes": int(outcome["size_bytes"]),
        "persist_s": durable - started,
        "commit_s": commit_s,
        "order": [context.generation, context.epoch],
        "differing": list(outcome.get("differing", ())),
    }


def _found_complete(context: Context, request: Request) -> dict[str, Any] | None:
    """
    The outcome of a save that the lost store, or an executor that died, left behind whole: committed already, or with every part written.

    Called from: any pod; the one that finds it complete commits it.
    """
    directory = directory_of(context, request)
    ours = generation_of(context, request)
    try:
        if not commit.is_committed_as(directory, ours):
            if context.root:
                commit.fence(context.root, context.generation)
            if commit.finish(directory, generation=ours, over_strangers=request.destination is not None) is None:
                return None
            _log.warning("step %d was written completely by an earlier process: committed it now", request.step)
            if context.root and request.destination is None:
                milestones.remember(context.root, request.step, ours)
        size_bytes = catalog.size_bytes(directory)
    except (OSError, CommitError):
        return None
    order = [context.generation, context.epoch]
    return {"path": directory, "size_bytes": size_bytes, "persist_s": 0.0, "commit_s": 0.0, "order": order}


def withdraw(context: Context, step: int, error: ErrorDocument, *, persist: bool, rescued: bool = False) -> None:
    """
    This pod has no part in `step`: end it on every pod, without waiting for the bound.

    Raises:
        SaveError: always, with the failures that every pod now knows.
    """
    phase = phase_of(context, step, persist=persist, rescued=rescued)
    local = {rank: RemoteFailure(error.kind, error.message) for rank in context.local_ranks}
    failures = {rank: failure for rank, failure in error.failures.items() if rank in local} or local
    documents = failures_module.documents(failures)
    if persist:
        # A pod that gives up in the middle (its storage hangs) is waited for at its result, the coordinator's at the outcome.
        for attempt in range(len(commit_module.RETRY_AFTER_S) + 1):
            context.exchange.post(f"{phase}/{attempt}/result", {"failures": documents})
            if context.coordinator:
                context.exchange.publish(f"{phase}/{attempt}/outcome", {"failures": documents})
    context.exchange.post(f"{phase}/plan", {"failures": documents, "ranks": {}})
    if context.coordinator:
        _publish_decision(context, phase, persist=persist)
    failures_module.raise_told(context.agreed.decision(context.exchange, phase, context.peer_timeout_s * 2), step)


def check_destination(context: Context, request: Request) -> None:
    """
    End a save that must not be written where it would go, on every pod.

    Raises:
        SaveError: the checkpoint exists and may not be overwritten; or the save was found in the arena by a successor of
            the sidecar that knew its destination.
    """
    destination = request.destination
    problem: Exception | None = None
    own = context.step_path(request.step) if request.persist and destination is None and context.root else ""
    if request.persist and destination is None and not context.root:
        problem = LookupError(f"where step {request.step} was to go went with the sidecar that was told it")
    elif own and (why := _in_the_way(own)):
        problem = FileExistsError(errno.EEXIST, why, own)
    elif destination is not None and destination.get("overwrite") is False:
        directory = str(destination["path"])
        ours = generation_of(context, request)
        # A successor repeats the save of an executor that died, which may have committed it.
        if os.path.exists(os.path.join(directory, names.COMMIT_MARKER)) and commit.committed_as(directory) != ours:
            problem = RuntimeError(f"Checkpoint already exists and overwrite=False: {directory}")
    if problem is not None:
        failures = dict.fromkeys(context.local_ranks, failures_module.of_exception(problem))
        withdraw(context, request.step, ErrorDocument("PersistError", str(problem), failures), persist=True)


def _in_the_way(directory: str) -> str:
    """Why a step cannot be saved into its directory of the root; empty: nothing is known. A storage that fails shows at the write."""
    if os.path.islink(directory):
        return "is a link to somewhere else, and no directory of this root"
    try:
        return commit.STRANGERS if commit.is_strangers(directory) else ""
    except OSError:
        return ""


def phase_of(context: Context, step: int, *, persist: bool, rescued: bool = False) -> str:
    # A step comes again after a load of an older one, a snapshot comes again when its trainer died, and its successors save
    # that step once more: none may meet the keys of the time before. Every pod counts the same loads.
    kind = "rescued" if rescued else "save" if persist else "snapshot"
    return f"{kind}/{context.epoch}/{step}"


# --- agreeing on the plan --------------------------------------------------------------------------------------------


def read_slots(context: Context, request: Request) -> tuple[dict[int, image.SlotImage], dict[int, RemoteFailure]]:
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
    request: Request,
    phase: str,
    slot_images: Mapping[int, image.SlotImage],
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
        "ranks": {str(r): [p.layout.digest, p.opaque_lengths] for r, p in slot_images.items()},
    }
    publish_layouts(context, slot_images)
    context.exchange.post(f"{phase}/plan", document)
    if context.coordinator:
        _rise_above(context, request)
        _publish_decision(context, phase, persist=request.persist)
    # The coordinator waits as long for its peers, and then has to tell.
    decision = context.agreed.decision(context.exchange, phase, context.peer_timeout_s * 2)
    context.generation = max(context.generation, int(decision["generation"]))
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


def _rise_above(context: Context, request: Request) -> None:
    """
    (coordinator) Without a root generations are times, and a run whose clock was ahead would shut the place that it wrote to for all that
    come later: this session goes on above whatever lies there.
    """
    if context.root or not request.persist:
        return
    directory = directory_of(context, request)
    context.watch.storage(f"look into {directory}")
    try:
        lies = commit.newest_written(directory)
    except OSError as err:
        _log.warning("cannot list %s before the write: %s", directory, err)
        return
    finally:
        context.watch.idle()
    if lies > context.generation:
        _log.warning(
            "%s was written by a newer session, or under a clock that is ahead: its files are removed", directory
        )
        context.generation = lies + 1


def publish_layouts(context: Context, slot_images: Mapping[int, image.SlotImage]) -> None:
    """
    Have the other pods find the layouts of this one. Under names of their own: what did not change costs nothing, and a coordinator that
    was replaced finds them again.
    """
    for slot_layout in (slot_image.layout for slot_image in slot_images.values()):
        if slot_layout.digest not in context.agreed.layouts:
            context.exchange.publish(
                agreements.layout_name(slot_layout.digest), {"layout": slot_layout.encoded.decode()}
            )
            context.agreed.layouts[slot_layout.digest] = slot_layout


def find_layout(context: Context, digest: str) -> layout.Layout:
    """
    (coordinator) A layout that some pod has published.

    Raises:
        BarrierTimeout: none has.
    """
    cached = context.agreed.layouts.get(digest)
    if cached is None:
        document = context.exchange.receive(agreements.layout_name(digest), context.peer_timeout_s)
        cached = context.agreed.layouts[digest] = layout.decode(str(document["layout"]).encode())
    return cached


def _publish_decision(context: Context, phase: str, *, persist: bool) -> None:
    gone: list[str] = []
    try:
        decision = _decide(context, phase, gone, persist=persist)
    except BarrierTimeout as err:
        # Who comes late reads it still; it goes when all of them have come to another save.
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
    about = {"generation": context.generation, **context.agreed.notice()}
    context.exchange.publish(f"{phase}/plan", decision | about)
    # Behind the decision, which every pod waits for.
    context.exchange.unpublish(gone)


def _results(phase: str) -> list[str]:
    """Where a pod that withdraws leaves its results, one for each try."""
    return [f"{phase}/{attempt}/result" for attempt in range(len(commit_module.RETRY_AFTER_S) + 1)]


def _decide(context: Context, phase: str, gone: list[str], *, persist: bool) -> dict[str, Any]:
    """(coordinator) The plan for these layouts, or the failures that every pod reported; `gone` gets the names to unpublish."""
    documents = context.exchange.collect(f"{phase}/plan", context.peer_timeout_s)
    # Every pod is here, so every pod has left the save before: its keys can go.
    context.exchange.forget(context.finished_phases)
    context.finished_phases = [f"{phase}/plan"]
    failures = failures_module.collect(documents)
    digests = {int(rank): str(entry[0]) for document in documents.values() for rank, entry in document["ranks"].items()}
    # Of a save that fails as well: what was published for it has to go some day.
    gone += context.agreed.settle(digests)
    if failures:
        # A pod that withdrew has left its results too.
        context.finished_phases += _results(phase)
        return {"failures": failures_module.documents(failures)}
    plan_id = plan_module.plan_id(digests)
    if persist and context.agreed.plan(plan_id) is None:
        plan = plan_module.make_plan({rank: find_layout(context, digest) for rank, digest in digests.items()})
        context.exchange.publish(agreements.plan_name(plan_id), plan.to_document())
        context.agreed.remember(plan)
    return {"failures": {}, "plan_id": plan_id}
