"""
The coordinator's end of a save: commit it when every pod's bytes are durable, publish the outcome, and retry after an error of storage.

Called from: `executor.save.persist`, in the pod of rank 0 only.

    collect the results --> all durable --> fence, manifest, .metadata --> outcome: committed
                            storage failed --> make room if it is full --> outcome: again, after a pause
                            other failure --> remove the written files --> outcome: failed
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, Final

from pillion import fault_points
from pillion.errors import BarrierTimeout, CommitError, PillionError, RemoteFailure
from pillion.wire import manifest, names
from pillion_sidecar import channel
from pillion_sidecar.checkpoint import commit, milestones, retention
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange import failures as failures_module
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.save import replicas
from pillion_sidecar.executor.save.write import PodWriter, RankPlacement, generation_of
from pillion_sidecar.executor.session import Context
from pillion_sidecar.run import journal
from pillion_sidecar.storage import generation as generations
from pillion_sidecar.storage import late_names
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.waits import WaitKind

RETRY_AFTER_S: Final = (1.0, 4.0, 15.0)
"""Pauses before a save is written again after an error of storage, 20 s in all. Most errors of network storage pass within seconds. Later saves
wait in their slots for this time; then the save has failed. The saves after it try once each until one is committed: while a storage is known
to fail, training does not wait long for a slot."""

LASTING_ERRNOS: Final = frozenset(
    {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS}
)
"""Errors that concern the path, and not the state of the storage: the next try would fail in the same way."""


def metadata_of(context: Context, request: channel.Persist, phase: str, plan: plan_module.Plan) -> bytes:
    """(coordinator) Return `.metadata` of this save. Its bytes are cached as long as plan, lengths and generation stay the same."""
    documents = context.exchange.collect(f"{phase}/plan", context.peer_timeout_s)
    ranks = {int(rank): entry for document in documents.values() for rank, entry in document["ranks"].items()}
    generation = generation_of(context, request)
    key = (plan.plan_id, generation, context.object_bytes, tuple(tuple(ranks[rank][1]) for rank in sorted(ranks)))
    cached = context.metadata.get(key)
    if cached is not None:
        return cached
    chunks: list[manifest.StoredChunk] = []
    opaque: list[manifest.StoredBytes] = []
    paths: dict[str, tuple[str | int, ...]] = {}
    for rank, (name, lengths) in ranks.items():
        rank_layout = context.agreed.layouts[name]
        place = RankPlacement(rank, rank_layout, tuple(lengths), plan, generation, context.object_bytes)
        chunks += [chunk for _, chunk in place.chunks()]
        opaque += [leaf for _, leaf in place.opaque()]
        paths |= rank_layout.paths
    built = commit.build_metadata(chunks, opaque, paths)
    context.metadata.clear()
    context.metadata[key] = built
    return built


def conclude(
    context: Context,
    request: channel.Persist,
    phase: str,
    plan: plan_module.Plan,
    share: PodWriter,
    metadata: futures.Future[bytes],
    *,
    attempt: int,
) -> dict[str, Any]:
    """Commit the save if every pod's bytes are durable, and publish the outcome of this attempt to every pod. Return it."""
    at = f"{phase}/{attempt}"
    outcome = _outcome(context, request, at, plan, share, metadata, attempt=attempt)
    context.finished_phases.append(f"{at}/result")
    context.finished_names.append(f"{at}/outcome")
    context.exchange.publish(f"{phase}/{attempt}/outcome", outcome)
    if request.repeated and outcome.get("again_s") is None:
        # Some peers may wait in a later attempt, which the previous executor had announced to them.
        for later in range(attempt + 1, len(RETRY_AFTER_S) + 1):
            context.exchange.publish(f"{phase}/{later}/outcome", outcome)
    return outcome


def _outcome(
    context: Context,
    request: channel.Persist,
    at: str,
    plan: plan_module.Plan,
    share: PodWriter,
    metadata: futures.Future[bytes],
    *,
    attempt: int,
) -> dict[str, Any]:
    folder = share.folder
    try:
        documents = context.exchange.collect(f"{at}/result", context.persist_timeout_s)
        failed = {first: document for first, document in documents.items() if document["failures"]}
        outcome: dict[str, Any] = {"failures": failures_module.documents(failures_module.collect(documents))}
        if failed:
            errnos = {number for document in failed.values() for number in document.get("errnos", ())}
            refused = all("errnos" in document for document in failed.values())
            passes = refused and not errnos & LASTING_ERRNOS
            if passes and attempt < len(RETRY_AFTER_S) and not context.storage_refuses:
                _make_room(context, request, errnos)
                return outcome | {"again_s": RETRY_AFTER_S[attempt]}
            context.storage_refuses = context.storage_refuses or refused
            _discard(context, request, folder)
            return outcome | {"discarded": True}
        _check_generations(context, request, documents)
        bound_s = context.watch.storage_timeout_s + late_names.LATE_S
        context.watch.begins(WaitKind.STORAGE, f"commit {folder}", bound_s)
        differing = _differing(context, plan, documents)
        _commit(context, request, plan, share, documents, metadata.result(), differing)
        context.storage_refuses = False
        size_bytes = sum(int(d["size_bytes"]) for d in documents.values())
        return outcome | {"size_bytes": size_bytes, "differing": differing}
    except BarrierTimeout as err:
        missing = failures_module.documents(failures_module.of_missing(err))
        return {"failures": missing, "phase": err.phase, "waited_s": err.waited_s}
    except protocol.StoreLost:
        raise
    except commit.FilesMissing as err:
        _discard(context, request, folder)
        failures = failures_module.documents(_of_files(context, err))
        return {"failures": failures, "kind": "CommitError", "discarded": True}
    except Exception as err:  # a boundary: the peers wait for the outcome
        outcome = {"failures": failures_module.documents({0: failures_module.of_exception(err)}), "kind": "CommitError"}
        passes = isinstance(err, OSError) and err.errno not in LASTING_ERRNOS
        if passes and attempt < len(RETRY_AFTER_S) and not context.storage_refuses:
            _make_room(context, request, {getattr(err, "errno", None)})
            outcome["again_s"] = RETRY_AFTER_S[attempt]
        return outcome
    finally:
        context.watch.idle()


def _check_generations(context: Context, request: channel.Persist, documents: Mapping[int, Mapping[str, Any]]) -> None:
    """
    Check that every pod has written under the coordinator's generation.

    Raises:
        CommitError: a pod has another generation, so that its files do not have the names that `.metadata` has.
    """
    own_generation = generation_of(context, request)
    for first, document in documents.items():
        if document["generation"] != own_generation:
            raise CommitError(
                f"rank {first} wrote generation {document['generation']}, the coordinator has {own_generation}"
            )


def _of_files(context: Context, err: commit.FilesMissing) -> dict[int, RemoteFailure]:
    """Return a failure for each rank whose files are missing, with the problem of its first such file."""
    failures: dict[int, RemoteFailure] = {}
    for name, why in sorted(err.files.items()):
        data, part = names.parse_data_file(name), names.parse_part_file(name)
        rank = data[0] if data is not None else part[0] if part is not None else 0
        text = f"{name} {why} in {err.folder}, where rank 0 commits; all pods of a job need one storage"
        failures.setdefault(rank, RemoteFailure("CommitError", text))
    return failures


def _make_room(context: Context, request: channel.Persist, errnos: set[int | None]) -> None:
    """If the disk is full, remove now the checkpoints that the policy removes after this save."""
    if errnos & {errno.ENOSPC, errno.EDQUOT} and context.root is not None and request.destination is None:
        with contextlib.suppress(OSError, PillionError):
            commit.fence(context.root, context.generation)
            context.watch.storage("make room")
            room = retention.make_room(
                context.root, context.retention, current=request.step, generation=context.generation
            )
            for _ in room:
                context.watch.moved()


def _differing(context: Context, plan: plan_module.Plan, documents: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return the names whose replicas differ: within a pod in this save; between pods when this plan's samples were compared."""
    fqns = replicas.across(documents.values())
    if any("sample" in document for document in documents.values()):
        context.differing = plan.plan_id, fqns
    fqns_before = context.differing[1] if context.differing[0] == plan.plan_id else []
    return sorted({*fqns, *fqns_before})[: replicas.MAX_DIFFERING]


def _commit(
    context: Context,
    request: channel.Persist,
    plan: plan_module.Plan,
    share: PodWriter,
    documents: Mapping[int, Mapping[str, Any]],
    metadata: bytes,
    differing: Sequence[str],
) -> None:
    folder, generation = share.folder, share.generation
    fault_points.reach(fault_points.FaultPoint.COMMIT, path=folder.path or "")

    def fence() -> None:
        if context.root is not None:
            commit.fence(context.root, context.generation)

    if request.repeated and commit.is_committed_as(folder, generation):
        return
    metadata = commit.identified(metadata, folder, generation)
    pods = {pod[0]: pod for pod in context.pods}
    parts = [
        manifest.PartReference(str(d["part"]), pods[first], str(d["digest"]), int(d["length"]))
        for first, d in documents.items()
    ]
    made = commit.make_manifest(
        step=request.step,
        generation=generation,
        run_id=context.run_id,
        world_size=context.world_size,
        plan_id=plan.plan_id,
        parts=parts,
        size_bytes=sum(int(d["size_bytes"]) for d in documents.values()),
        metadata=metadata,
        started_ns=request.started_ns,
        cause=request.cause,
        differing=differing,
        owner=context.owner,
        remarks=share.remarks,
    )
    files = {str(d["part"]): int(d["length"]) for d in documents.values()}
    for document in documents.values():
        files |= {str(name): int(length) for name, length in document["files"].items()}
    over_strangers = request.destination is not None
    context.known.forget(request.step)
    commit.publish(folder, made, metadata, files, over_strangers=over_strangers, is_new=share.is_new, fence=fence)


def note(context: Context, request: channel.Persist, share: PodWriter, outcome: channel.Persisted) -> None:
    """(coordinator) Note the commit on the root, and remove the files of older saves from a folder that was written again."""
    context.watch.storage(f"note the commit of {share.folder}")
    try:
        with contextlib.suppress(OSError):
            if context.root is not None and request.destination is None:
                milestones.remember(context.root, request.step, share.generation, with_commit(request, outcome))
        with contextlib.suppress(OSError):
            if not share.is_new:
                retention.remove_older_files(share.folder, share.generation)
    finally:
        context.watch.idle()


def with_commit(request: channel.Persist, outcome: channel.Persisted) -> dict[str, object] | None:
    """Return the run's journal of a request, with its save committed now. None: the request has none. Pure but for the clock."""
    if request.run is None:
        return None
    return journal.committed(
        request.run,
        request.step,
        now_ns=time.time_ns(),
        size_bytes=outcome.size_bytes,
        persist_s=outcome.persist_s,
        commit_s=outcome.commit_s,
    )


def retain(context: Context, current: int, slice_s: float) -> bool:
    """
    (coordinator) Remove checkpoints that the policy does not keep, for at most `slice_s` seconds. Return whether some may be left.

    This is a separate request after the save, whose outcome is known by then, because some file systems take 0.2 s a GiB. Each removed file
    moves the watch on, so that a slow storage does not count as a hung one.

    Raises:
        OSError: the root cannot be listed.
    """
    context.watch.storage("retention")
    fault_points.working_on(current)
    fault_points.reach(fault_points.FaultPoint.RETAIN, path=context.step_folder(current).path or "")
    until = time.monotonic() + slice_s
    removing = retention.tidy(
        context.own_root(),
        context.retention,
        current=current,
        generation=context.generation,
        known=context.known,
    )
    try:
        for _ in removing:
            context.watch.moved()
            if time.monotonic() > until:
                return True
        return False
    finally:
        context.watch.idle()


def _discard(context: Context, request: channel.Persist, folder: Folder) -> None:
    """Remove the files of a failed save. Files of other saves have other names, and stay in the folder."""
    generation = generation_of(context, request)
    try:
        if commit.is_committed_as(folder, generation):
            return
        folder.delete([name for name in folder.files() if generations.in_file_name(name) == generation])
        folder.remove_if_empty()
    except OSError:
        pass  # the storage fails already; retention removes the files after the next commit
