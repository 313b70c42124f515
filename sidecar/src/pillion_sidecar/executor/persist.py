"""
One save, from sealed slots to a committed checkpoint. Called from: `executor.worker`, one at a time.

    every pod:    read slots -> post "plan"            digests of the layouts, lengths of the opaque leaves
    coordinator:  collect, make or reuse the plan, publish
    every pod:    frame, write and digest its share, write its part file, post "result"
    coordinator:  collect, fence, publish manifest and .metadata, publish the outcome, apply retention
    every pod:    receive the outcome

A failure on any rank travels as a document through the same phases, so that every pod ends the save with the same failures.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Final

from pillion.errors import BarrierTimeout, ErrorDocument, PersistError, RemoteFailure, SaveError
from pillion.wire import layout, manifest, names
from pillion_sidecar import commit, retention
from pillion_sidecar.executor import faults, images, planning
from pillion_sidecar.executor.context import Context
from pillion_sidecar.storage import digest, directio

KEPT_PLANS: Final = 4
"""Plans remembered a session: layouts change rarely (frozen layers, a partial save), and then go back and forth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the supervisor asks for."""

    step: int
    slot: int
    persist: bool
    destination: Mapping[str, Any] | None
    sequence: int
    """Distinguishes saves to one directory; 0 where each step has its own."""

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Request:
        return cls(
            step=int(document["step"]),
            slot=int(document["slot"]),
            persist=bool(document["persist"]),
            destination=document.get("destination"),
            sequence=int(document.get("sequence", 0)),
        )


def persist(context: Context, request: Request) -> dict[str, Any]:
    """
    Run one save.

    Blocks: peer_timeout_s for each agreement, persist_timeout_s for the peers' writes.

    Returns:
        The outcome: path, size_bytes, persist_s, commit_s.

    Raises:
        SaveError: with the failures of every failed rank; no checkpoint was made.
    """
    phase = phase_of(context, request.step, persist=request.persist)
    started = time.monotonic()
    pictures, failures = read_slots(context, request)
    plan = _agree(context, request, phase, pictures, failures)
    if not request.persist:
        return {"path": "", "size_bytes": 0, "persist_s": time.monotonic() - started, "commit_s": 0.0}
    share = _Share(context, request, plan)
    result: dict[str, Any] = {"failures": {}}
    metadata: futures.Future[bytes] | None = None
    with futures.ThreadPoolExecutor(1, "pillion-metadata") as pool:
        if context.coordinator:
            # Beside the writing: a hundred thousand tensors take seconds, and the coordinator waits for its disk anyway.
            metadata = pool.submit(_metadata, context, request, phase, plan)
        try:
            result = share.write(pictures)
        except Exception as err:  # a boundary: whatever failed here is told to every rank
            result = _failed(context, err)
    durable = time.monotonic()
    context.exchange.post(f"{phase}/result", result)
    if context.coordinator and metadata is not None:
        _conclude(context, request, phase, plan, share.directory, metadata)
    outcome = context.exchange.receive(f"{phase}/outcome", context.persist_timeout_s)
    faults.raise_told(outcome, request.step)
    return {
        "path": share.directory,
        "size_bytes": int(outcome["size_bytes"]),
        "persist_s": durable - started,
        "commit_s": time.monotonic() - durable,
    }


def withdraw(context: Context, step: int, error: ErrorDocument, *, persist: bool) -> None:
    """
    This pod has no part in `step`: end it on every pod, without waiting for the bound.

    Raises:
        SaveError: always, with the failures that every pod now knows.
    """
    phase = phase_of(context, step, persist=persist)
    local = {rank: RemoteFailure(error.kind, error.message) for rank in context.local_ranks}
    failures = {rank: failure for rank, failure in error.failures.items() if rank in local} or local
    context.exchange.post(f"{phase}/plan", {"failures": faults.documents(failures), "ranks": {}})
    if context.coordinator:
        _publish_decision(context, phase, persist=persist)
    faults.raise_told(context.exchange.receive(f"{phase}/plan", context.peer_timeout_s * 2), step)


def phase_of(context: Context, step: int, *, persist: bool) -> str:
    # A step comes again after a load of an older one, and a snapshot comes again when its trainer died: neither may meet
    # the keys of the time before. Every pod counts the same loads.
    return f"{'save' if persist else 'snapshot'}/{context.loads}/{step}"


# --- agreeing on the plan --------------------------------------------------------------------------------------------


def read_slots(context: Context, request: Request) -> tuple[dict[int, images.Image], dict[int, RemoteFailure]]:
    pictures: dict[int, images.Image] = {}
    failures: dict[int, RemoteFailure] = {}
    for rank in context.local_ranks:
        try:
            pictures[rank] = context.reader.read(context.segments[rank], request.slot, step=request.step)
        except images.TornSlot as err:
            failures[rank] = faults.of_exception(err)
    return pictures, failures


def _agree(
    context: Context,
    request: Request,
    phase: str,
    pictures: Mapping[int, images.Image],
    failures: Mapping[int, RemoteFailure],
) -> planning.Plan:
    document: dict[str, Any] = {
        "failures": faults.documents(failures),
        "ranks": {str(r): [p.layout.digest, p.opaque_lengths] for r, p in pictures.items()},
    }
    for picture in pictures.values():
        of = picture.layout
        if of.digest not in context.layouts:
            # Under a key of its own and once a session: what did not change costs nothing, and a coordinator that was
            # replaced finds it again.
            context.exchange.publish(f"layout/{of.digest}", {"layout": of.encoded.decode()})
            context.layouts[of.digest] = of
    context.exchange.post(f"{phase}/plan", document)
    if context.coordinator:
        _publish_decision(context, phase, persist=request.persist)
    # The coordinator waits as long for its peers, and then has to tell.
    decision = context.exchange.receive(f"{phase}/plan", context.peer_timeout_s * 2)
    faults.raise_told(decision, request.step)
    plan_id = str(decision["plan_id"])
    if not request.persist:
        return planning.Plan(plan_id, {}, {})
    if plan_id not in context.plans:
        document = context.exchange.receive(f"plan/{plan_id}", context.peer_timeout_s)
        _remember(context, planning.Plan.from_document(document))
    return context.plans[plan_id]


def _remember(context: Context, plan: planning.Plan) -> None:
    context.plans[plan.plan_id] = plan
    while len(context.plans) > KEPT_PLANS:
        del context.plans[next(iter(context.plans))]


def _publish_decision(context: Context, phase: str, *, persist: bool) -> None:
    try:
        decision = _decide(context, phase, persist=persist)
    except BarrierTimeout as err:
        decision = {"failures": faults.documents(faults.of_missing(err)), "phase": err.phase, "waited_s": err.waited_s}
    except planning.PlanError as err:
        decision = {"failures": faults.documents({rank: faults.of_exception(err) for rank in err.ranks})}
    context.exchange.publish(f"{phase}/plan", decision)


def _decide(context: Context, phase: str, *, persist: bool) -> dict[str, Any]:
    """(coordinator) The plan for these layouts, or the failures that every pod reported."""
    documents = context.exchange.collect(f"{phase}/plan", context.peer_timeout_s)
    # Every pod is here, so every pod has left the save before: its keys can go.
    context.exchange.forget(context.finished_phases)
    context.finished_phases = [f"{phase}/plan", f"{phase}/result", f"{phase}/outcome"]
    failures = faults.collect(documents)
    if failures:
        return {"failures": faults.documents(failures)}
    digests = {int(rank): str(entry[0]) for document in documents.values() for rank, entry in document["ranks"].items()}
    plan_id = planning.plan_id(digests)
    if persist and plan_id not in context.plans:
        for name in set(digests.values()) - context.layouts.keys():
            document = context.exchange.receive(f"layout/{name}", context.peer_timeout_s)
            context.layouts[name] = layout.decode(str(document["layout"]).encode())
        plan = planning.make_plan({rank: context.layouts[name] for rank, name in digests.items()})
        context.exchange.publish(f"plan/{plan_id}", plan.to_document())
        _remember(context, plan)
    return {"failures": {}, "plan_id": plan_id}


# --- this pod's share ------------------------------------------------------------------------------------------------


class _Share:
    """Where this pod writes what."""

    def __init__(self, context: Context, request: Request, plan: planning.Plan) -> None:
        self.context = context
        self.plan = plan
        self.step = request.step
        destination = request.destination or {}
        self.directory = str(destination.get("path") or context.step_path(request.step))
        self.generation = generation_text(context.generation, request.sequence)

    def write(self, pictures: Mapping[int, images.Image]) -> dict[str, Any]:
        """
        Frame, write and digest; leave the part file. Returns the result document.

        Raises:
            PersistError: with each local rank that failed, and why.
        """
        os.makedirs(self.directory, exist_ok=True)
        failures: dict[int, RemoteFailure] = {}
        chunks: list[manifest.StoredChunk] = []
        opaque: list[manifest.StoredBytes] = []
        files: dict[str, int] = {}
        paths: dict[str, tuple[str | int, ...]] = {}
        for rank, picture in pictures.items():
            try:
                self._write_rank(rank, images.frame(picture), chunks, opaque, files, paths)
            except Exception as err:  # a boundary: the other local ranks' failures are to be told too
                failures[rank] = faults.of_exception(err)
        if failures:
            for name in files:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.directory, name))
            raise PersistError("this pod could not write its share", step=self.step, failures=failures)
        part = manifest.Part(
            step=self.step,
            generation=self.generation,
            run_id=self.context.run_id,
            world_size=self.context.world_size,
            plan_id=self.plan.plan_id,
            ranks=self.context.local_ranks,
            files=files,
            chunks=tuple(chunks),
            opaque=tuple(opaque),
            paths=paths,
        ).encode()
        name = names.part_file(self.context.first_rank, self.generation)
        directio.replace_file(os.path.join(self.directory, name), part)
        return {
            "failures": {},
            "part": name,
            "digest": digest.digest(part),
            "length": len(part),
            "size_bytes": sum(files.values()) + len(part),
        }

    def _write_rank(
        self,
        rank: int,
        picture: images.Image,
        chunks: list[manifest.StoredChunk],
        opaque: list[manifest.StoredBytes],
        files: dict[str, int],
        paths: dict[str, tuple[str | int, ...]],
    ) -> None:
        place = RankPlace(rank, picture.layout, picture.opaque_lengths, self.plan, self.generation)
        digests: list[str] = []
        with futures.ThreadPoolExecutor(1, "pillion-digest") as pool:
            digesting = pool.submit(images.digest_all, picture)
            if place.runs:
                target = os.path.join(self.directory, place.file)
                files[place.file] = directio.write_file(
                    target, picture.memory, place.runs, num_threads=self.context.write_threads
                )
            digests = digesting.result()
        num_items = len(picture.layout.items)
        for index, chunk in place.chunks():
            chunks.append(chunk.with_digest(digests[index]))
            paths[chunk.fqn] = picture.layout.paths[chunk.fqn]
        for index, leaf in place.opaque():
            opaque.append(leaf.with_digest(digests[num_items + index]))
            paths[leaf.fqn] = picture.layout.paths[leaf.fqn]


class RankPlace:
    """Where one rank's chunks lie in its file. Pure: the coordinator computes the same for every rank."""

    def __init__(
        self, rank: int, of: layout.Layout, opaque_lengths: tuple[int, ...], plan: planning.Plan, generation: str
    ) -> None:
        self.layout = of
        self.file = names.data_file(rank, 0, generation)
        self._opaque_lengths = opaque_lengths
        self._item_ranges = plan.items.get(rank, ())
        self._opaque_ranges = plan.opaque.get(rank, ())
        self._opaque_starts, _ = of.opaque_starts(opaque_lengths)
        self.runs = [directio.Run(of.starts[a], of.end(b - 1) - of.starts[a]) for a, b in self._item_ranges]
        for first, last in self._opaque_ranges:
            start = self._opaque_starts[first]
            end = self._opaque_starts[last - 1] + opaque_lengths[last - 1]
            self.runs.append(directio.Run(start, end - start))
        self._placed = directio.place(self.runs)

    def chunks(self) -> list[tuple[int, manifest.StoredChunk]]:
        """(index of the item, its chunk without a digest)"""
        found = []
        of = self.layout
        for run, (first, last) in enumerate(self._item_ranges):
            shift = self._placed.file_offsets[run] - self.runs[run].slot_offset
            for index in range(first, last):
                item, start = of.items[index], of.starts[index]
                found.append(
                    (
                        index,
                        manifest.StoredChunk(
                            item.fqn, item.dtype, item.size, item.offsets, item.sizes,
                            self.file, start + shift, of.end(index) - start, "",
                        ),
                    )
                )  # fmt: skip
        return found

    def opaque(self) -> list[tuple[int, manifest.StoredBytes]]:
        """(index of the opaque leaf, it without a digest)"""
        found = []
        for position, (first, last) in enumerate(self._opaque_ranges):
            run = len(self._item_ranges) + position
            shift = self._placed.file_offsets[run] - self.runs[run].slot_offset
            for index in range(first, last):
                fqn, start = self.layout.opaque[index], self._opaque_starts[index]
                found.append(
                    (index, manifest.StoredBytes(fqn, self.file, start + shift, self._opaque_lengths[index], ""))
                )
        return found


def generation_text(generation: int, sequence: int) -> str:
    return f"{generation}-{sequence}" if sequence else str(generation)


# --- committing ------------------------------------------------------------------------------------------------------


def _metadata(context: Context, request: Request, phase: str, plan: planning.Plan) -> bytes:
    """(coordinator) `.metadata` of this save; the same bytes as long as plan, lengths and generation are."""
    documents = context.exchange.collect(f"{phase}/plan", context.peer_timeout_s)
    ranks = {int(rank): entry for document in documents.values() for rank, entry in document["ranks"].items()}
    generation = generation_text(context.generation, request.sequence)
    key = (plan.plan_id, generation, tuple(tuple(ranks[rank][1]) for rank in sorted(ranks)))
    known = context.metadata.get(key)
    if known is not None:
        return known
    chunks: list[manifest.StoredChunk] = []
    opaque: list[manifest.StoredBytes] = []
    paths: dict[str, tuple[str | int, ...]] = {}
    for rank, (name, lengths) in ranks.items():
        of = context.layouts[name]
        place = RankPlace(rank, of, tuple(lengths), plan, generation)
        chunks += [chunk for _, chunk in place.chunks()]
        opaque += [leaf for _, leaf in place.opaque()]
        paths |= of.paths
    built = commit.build_metadata(chunks, opaque, paths)
    context.metadata.clear()
    context.metadata[key] = built
    return built


def _conclude(
    context: Context,
    request: Request,
    phase: str,
    plan: planning.Plan,
    directory: str,
    metadata: futures.Future[bytes],
) -> None:
    """(coordinator) Commit when every pod's bytes are durable, and tell every pod what became of the save."""
    try:
        documents = context.exchange.collect(f"{phase}/result", context.persist_timeout_s)
        failures = faults.collect(documents)
        if failures:
            outcome: dict[str, Any] = {"failures": faults.documents(failures)}
            _discard(context, request, directory)
        else:
            outcome = {"failures": {}, "size_bytes": sum(int(d["size_bytes"]) for d in documents.values())}
            _commit(context, request, plan, directory, documents, metadata.result())
    except BarrierTimeout as err:
        outcome = {"failures": faults.documents(faults.of_missing(err)), "phase": err.phase, "waited_s": err.waited_s}
    except Exception as err:  # a boundary: the peers wait for the outcome
        outcome = {"failures": faults.documents({0: faults.of_exception(err)}), "kind": "CommitError"}
    context.exchange.publish(f"{phase}/outcome", outcome)


def _commit(
    context: Context,
    request: Request,
    plan: planning.Plan,
    directory: str,
    documents: Mapping[int, Mapping[str, Any]],
    metadata: bytes,
) -> None:
    if context.root:
        commit.fence(context.root, context.generation)
    generation = generation_text(context.generation, request.sequence)
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
    )
    commit.publish(directory, made, metadata)
    with contextlib.suppress(OSError):
        directio.fsync_directory(os.path.dirname(directory))
        retention.remove_older_files(directory, generation)
        if context.root and request.destination is None:
            retention.apply(context.root, context.retention, current=request.step)


def _discard(context: Context, request: Request, directory: str) -> None:
    """A save that failed leaves nothing behind, unless the directory holds a committed checkpoint of before."""
    generation = generation_text(context.generation, request.sequence)
    try:
        for name in os.listdir(directory):
            data, part = names.parse_data_file(name), names.parse_part_file(name)
            if (data is not None and data[2] == generation) or (part is not None and part[1] == generation):
                os.unlink(os.path.join(directory, name))
        if not os.listdir(directory):
            os.rmdir(directory)
    except OSError:
        pass  # storage is in trouble already; retention removes it after the next commit


# --- failures --------------------------------------------------------------------------------------------------------


def _failed(context: Context, err: Exception) -> dict[str, Any]:
    if isinstance(err, SaveError) and err.failures:
        return {"failures": faults.documents(err.failures)}
    return {"failures": faults.documents({rank: faults.of_exception(err) for rank in context.local_ranks})}
