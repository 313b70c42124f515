"""
The coordinator's end of a save: commit when every pod's bytes are durable, say what became of it, try again what storage refused.

Called from: `executor.save.persist`, in the pod of rank 0 only.

    collect the results --> all well --> fence, manifest, .metadata --> outcome: committed
                            storage failed --> make room when it is full --> outcome: again, after a pause
                            anything else --> remove what was written --> outcome: failed
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, Final

from pillion import fault_points
from pillion.errors import BarrierTimeout, CommitError, PillionError, RemoteFailure
from pillion.wire import manifest, names
from pillion_sidecar.checkpoint import commit, milestones, retention
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange import failures as failures_module
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.save import replicas
from pillion_sidecar.executor.save.request import Request
from pillion_sidecar.executor.save.write import RankPlacement, generation_of
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage import durable
from pillion_sidecar.waits import WaitKind

RETRY_AFTER_S: Final = (1.0, 4.0, 15.0)
"""Pauses before a save that storage refused is written again: most errors of network storage pass within seconds. 20 s in all, for
which what is behind waits in its slot; then it has failed, and the saves behind it try once each, until one is committed: where training waits
for a slot, it is not held up by a storage that is known to be down."""

LASTING_ERRNOS: Final = frozenset(
    {errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS}
)
"""What storage says of a place, and not of itself: the next try would find the same."""


def metadata_of(context: Context, request: Request, phase: str, plan: plan_module.Plan) -> bytes:
    """(coordinator) `.metadata` of this save; the same bytes as long as plan, lengths and generation are."""
    documents = context.exchange.collect(f"{phase}/plan", context.peer_timeout_s)
    ranks = {int(rank): entry for document in documents.values() for rank, entry in document["ranks"].items()}
    generation = generation_of(context, request)
    key = (plan.plan_id, generation, tuple(tuple(ranks[rank][1]) for rank in sorted(ranks)))
    cached = context.metadata.get(key)
    if cached is not None:
        return cached
    chunks: list[manifest.StoredChunk] = []
    opaque: list[manifest.StoredBytes] = []
    paths: dict[str, tuple[str | int, ...]] = {}
    for rank, (name, lengths) in ranks.items():
        rank_layout = context.agreed.layouts[name]
        place = RankPlacement(rank, rank_layout, tuple(lengths), plan, generation)
        chunks += [chunk for _, chunk in place.chunks()]
        opaque += [leaf for _, leaf in place.opaque()]
        paths |= rank_layout.paths
    built = commit.build_metadata(chunks, opaque, paths)
    context.metadata.clear()
    context.metadata[key] = built
    return built


def conclude(
    context: Context,
    request: Request,
    phase: str,
    plan: plan_module.Plan,
    directory: str,
    metadata: futures.Future[bytes],
    *,
    attempt: int,
) -> None:
    """Commit when every pod's bytes are durable, and tell every pod what became of this attempt at the save."""
    at = f"{phase}/{attempt}"
    outcome = _outcome(context, request, at, plan, directory, metadata, attempt=attempt)
    context.finished_phases += [f"{at}/result", f"{at}/outcome"]
    context.exchange.publish(f"{phase}/{attempt}/outcome", outcome)
    if request.repeated and outcome.get("again_s") is None:
        # Peers that the executor before this one had sent into another attempt wait there.
        for later in range(attempt + 1, len(RETRY_AFTER_S) + 1):
            context.exchange.publish(f"{phase}/{later}/outcome", outcome)


def _outcome(
    context: Context,
    request: Request,
    at: str,
    plan: plan_module.Plan,
    directory: str,
    metadata: futures.Future[bytes],
    *,
    attempt: int,
) -> dict[str, Any]:
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
            _discard(context, request, directory)
            return outcome | {"discarded": True}
        _check_generations(context, request, documents)
        bound_s = context.watch.storage_timeout_s + commit.LATE_NAMES_S
        context.watch.begins(WaitKind.STORAGE, f"commit {directory}", bound_s)
        differing = _differing(context, plan, documents)
        _commit(context, request, plan, directory, documents, metadata.result(), differing)
        context.storage_refuses = False
        size_bytes = sum(int(d["size_bytes"]) for d in documents.values())
        return outcome | {"size_bytes": size_bytes, "differing": differing}
    except BarrierTimeout as err:
        missing = failures_module.documents(failures_module.of_missing(err))
        return {"failures": missing, "phase": err.phase, "waited_s": err.waited_s}
    except protocol.StoreLost:
        raise
    except commit.FilesMissing as err:
        _discard(context, request, directory)
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


def _check_generations(context: Context, request: Request, documents: Mapping[int, Mapping[str, Any]]) -> None:
    """
    Raises:
        CommitError: a pod wrote under another generation, so that its files have other names than `.metadata` would say.
    """
    ours = generation_of(context, request)
    for first, document in documents.items():
        if document["generation"] != ours:
            raise CommitError(f"rank {first} wrote generation {document['generation']}, the coordinator has {ours}")


def _of_files(context: Context, err: commit.FilesMissing) -> dict[int, RemoteFailure]:
    """The ranks whose files are missing failed, each with what is wrong with its own."""
    failures: dict[int, RemoteFailure] = {}
    for name, why in sorted(err.files.items()):
        data, part = names.parse_data_file(name), names.parse_part_file(name)
        rank = data[0] if data is not None else part[0] if part is not None else 0
        text = f"{name} {why} in {err.directory}, where rank 0 commits; all pods of a job need one storage"
        failures.setdefault(rank, RemoteFailure("CommitError", text))
    return failures


def _make_room(context: Context, request: Request, errnos: set[int | None]) -> None:
    """On a full disk: remove now what the policy removes after this save."""
    if errnos & {errno.ENOSPC, errno.EDQUOT} and context.root and request.destination is None:
        with contextlib.suppress(OSError, PillionError):
            commit.fence(context.root, context.generation)
            context.watch.storage("make room")
            room = retention.make_room(
                context.root, context.retention, current=request.step, generation=context.generation
            )
            for _ in room:
                context.watch.moved()


def _differing(context: Context, plan: plan_module.Plan, documents: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Names whose replicas differ: within a pod now, between pods when they were compared under this plan."""
    fqns = replicas.across(documents.values())
    if any("sample" in document for document in documents.values()):
        context.differing = plan.plan_id, fqns
    fqns_before = context.differing[1] if context.differing[0] == plan.plan_id else []
    return sorted({*fqns, *fqns_before})[: replicas.DIFFERING_MOST]


def _commit(
    context: Context,
    request: Request,
    plan: plan_module.Plan,
    directory: str,
    documents: Mapping[int, Mapping[str, Any]],
    metadata: bytes,
    differing: Sequence[str],
) -> None:
    fault_points.reach(fault_points.FaultPoint.COMMIT, path=directory)
    if context.root:
        commit.fence(context.root, context.generation)
    generation = generation_of(context, request)
    if request.repeated and commit.is_committed_as(directory, generation):
        return
    metadata = commit.identified(metadata, directory, generation)
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
    )
    files = {str(d["part"]): int(d["length"]) for d in documents.values()}
    for document in documents.values():
        files |= {str(name): int(length) for name, length in document["files"].items()}
    commit.publish(directory, made, metadata, files, over_strangers=request.destination is not None)
    with contextlib.suppress(OSError):
        durable.fsync_directory(os.path.dirname(directory))
        if context.root and request.destination is None:
            milestones.remember(context.root, request.step, generation)


def forget_older(context: Context, request: Request, directory: str) -> None:
    """(coordinator) Remove the files of older saves from a directory that was written again."""
    with contextlib.suppress(OSError):
        retention.remove_older_files(directory, generation_of(context, request))


def retain(context: Context, current: int, slice_s: float) -> bool:
    """
    (coordinator) Remove what the policy does not keep, for `slice_s`; whether something may be left.

    A request of its own, behind the saves: some file systems take 0.2 s a GiB, and the outcome is known already. Each file
    moves the watch on, so that slow is never taken for hung.

    Raises:
        OSError: the root cannot be listed.
    """
    context.watch.storage("retention")
    fault_points.working_on(current)
    fault_points.reach(fault_points.FaultPoint.RETAIN, path=context.step_path(current))
    until = time.monotonic() + slice_s
    try:
        for _ in retention.tidy(context.root, context.retention, current=current, generation=context.generation):
            context.watch.moved()
            if time.monotonic() > until:
                return True
        return False
    finally:
        context.watch.idle()


def _discard(context: Context, request: Request, directory: str) -> None:
    """A save that failed leaves nothing behind. What other saves have written into the directory stays: it has other names."""
    generation = generation_of(context, request)
    if commit.is_committed_as(directory, generation):
        return
    try:
        for name in os.listdir(directory):
            data, part = names.parse_data_file(name), names.parse_part_file(name)
            if (data is not None and data[2] == generation) or (part is not None and part[1] == generation):
                os.unlink(os.path.join(directory, name))
        if not os.listdir(directory):
            os.rmdir(directory)
    except OSError:
        pass  # storage is in trouble already; retention removes it after the next commit
