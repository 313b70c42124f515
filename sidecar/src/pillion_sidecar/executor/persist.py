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
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, Final

from pillion.errors import BarrierTimeout, ErrorDocument, PersistError, RemoteFailure, SaveError
from pillion.wire import layout, manifest, names
from pillion_sidecar import commit, retention
from pillion_sidecar.executor import faults, images, planning
from pillion_sidecar.executor.context import Context
from pillion_sidecar.executor.request import Request
from pillion_sidecar.storage import digest, directio

SWITCH_S: Final = 0.0005
"""sys.setswitchinterval of this process: a thread that goes on with the next block does not wait 5 ms for one that digests."""
KEPT_PLANS: Final = 4
"""Plans remembered a session: layouts change rarely (frozen layers, a partial save), and then go back and forth."""


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
    commit_s = time.monotonic() - durable
    if context.coordinator:
        _retain(context, request, share.directory)
    return {
        "path": share.directory,
        "size_bytes": int(outcome["size_bytes"]),
        "persist_s": durable - started,
        "commit_s": commit_s,
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


def check_destination(context: Context, request: Request) -> None:
    """
    End a save that must not be written where it would go, on every pod.

    Raises:
        SaveError: the checkpoint exists and may not be overwritten; or the save was found in the arena by a successor of
            the sidecar that knew its destination.
    """
    destination = request.destination
    problem: Exception | None = None
    if request.persist and destination is None and not context.root:
        problem = LookupError(f"where step {request.step} was to go went with the sidecar that was told it")
    elif destination is not None and destination.get("overwrite") is False:
        directory = str(destination["path"])
        ours = generation_text(context.generation, request.sequence)
        # A successor repeats the save of an executor that died, which may have committed it.
        if os.path.exists(os.path.join(directory, names.COMMIT_MARKER)) and committed_as(directory) != ours:
            problem = RuntimeError(f"Checkpoint already exists and overwrite=False: {directory}")
    if problem is not None:
        failures = dict.fromkeys(context.local_ranks, faults.of_exception(problem))
        withdraw(context, request.step, ErrorDocument("PersistError", str(problem), failures), persist=True)


def committed_as(directory: str) -> str | None:
    """Generation of the checkpoint in a directory; None where it is not one of ours."""
    try:
        with open(os.path.join(directory, names.MANIFEST), "rb") as file:
            return manifest.decode_manifest(file.read()).generation
    except (OSError, manifest.ManifestError):
        return None


def phase_of(context: Context, step: int, *, persist: bool) -> str:
    # A step comes again after a load of an older one, and a snapshot comes again when its trainer died: neither may meet
    # the keys of the time before. Every pod counts the same loads.
    return f"{'save' if persist else 'snapshot'}/{context.epoch}/{step}"


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
        sys.setswitchinterval(SWITCH_S)
        failures: dict[int, RemoteFailure] = {}
        places: dict[int, tuple[images.Image, RankPlace]] = {}
        for rank, picture in pictures.items():
            try:
                place = RankPlace(rank, picture.layout, picture.opaque_lengths, self.plan, self.generation)
                places[rank] = images.frame(picture), place
            except Exception as err:  # a boundary: the other local ranks' failures are to be told too
                failures[rank] = faults.of_exception(err)
        files = {place.file: place.file_bytes for _, place in places.values() if place.runs}
        with futures.ThreadPoolExecutor(1, "pillion-digest") as pool:
            # Beside the writing, and its text too: 10,000 tensors take as long as writing 200 MiB.
            describing = pool.submit(self._describe, places, files)
            for rank, (picture, place) in places.items():
                try:
                    if place.runs:
                        target = os.path.join(self.directory, place.file)
                        directio.write_file(target, picture.memory, place.runs, num_threads=self.context.write_threads)
                except Exception as err:  # a boundary, as above
                    failures[rank] = faults.of_exception(err)
        if failures:
            for name in files:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.directory, name))
            raise PersistError("this pod could not write its share", step=self.step, failures=failures)
        part = describing.result()
        name = names.part_file(self.context.first_rank, self.generation)
        directio.replace_file(os.path.join(self.directory, name), part)
        return {
            "failures": {},
            "part": name,
            "digest": digest.digest(part),
            "length": len(part),
            "size_bytes": sum(files.values()) + len(part),
        }

    def _describe(self, places: Mapping[int, tuple[images.Image, RankPlace]], files: Mapping[str, int]) -> bytes:
        """Digest every rank's image; the part file."""
        chunks: list[manifest.StoredChunk] = []
        opaque: list[manifest.StoredBytes] = []
        paths: dict[str, tuple[str | int, ...]] = {}
        for picture, place in places.values():
            digests = images.digest_all(picture)
            chunks += [chunk for _, chunk in place.chunks(digests)]
            opaque += [leaf for _, leaf in place.opaque(digests[len(picture.layout.items) :])]
            paths |= picture.layout.paths
        written = {chunk.fqn for chunk in chunks} | {leaf.fqn for leaf in opaque}
        return manifest.Part(
            step=self.step,
            generation=self.generation,
            run_id=self.context.run_id,
            world_size=self.context.world_size,
            plan_id=self.plan.plan_id,
            ranks=self.context.local_ranks,
            files=files,
            chunks=tuple(chunks),
            opaque=tuple(opaque),
            paths={fqn: path for fqn, path in paths.items() if fqn in written},
        ).encode()


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
        self.file_bytes = self._placed.file_bytes

    def chunks(self, digests: Sequence[str] | None = None) -> list[tuple[int, manifest.StoredChunk]]:
        """(index of the item, its chunk); `digests` are those of all items."""
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
                            self.file, start + shift, of.end(index) - start, digests[index] if digests else "",
                        ),
                    )
                )  # fmt: skip
        return found

    def opaque(self, digests: Sequence[str] | None = None) -> list[tuple[int, manifest.StoredBytes]]:
        """(index of the opaque leaf, it); `digests` are those of all opaque leaves."""
        found = []
        for position, (first, last) in enumerate(self._opaque_ranges):
            run = len(self._item_ranges) + position
            shift = self._placed.file_offsets[run] - self.runs[run].slot_offset
            for index in range(first, last):
                fqn, start, known = (
                    self.layout.opaque[index],
                    self._opaque_starts[index],
                    digests[index] if digests else "",
                )
                leaf = manifest.StoredBytes(fqn, self.file, start + shift, self._opaque_lengths[index], known)
                found.append((index, leaf))
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
        started_ns=request.started_ns,
        cause=request.cause,
    )
    commit.publish(directory, made, metadata)
    with contextlib.suppress(OSError):
        directio.fsync_directory(os.path.dirname(directory))


def _retain(context: Context, request: Request, directory: str) -> None:
    """(coordinator) Remove what the policy does not keep. After the outcome is told: some file systems take 0.2 s a GiB."""
    with contextlib.suppress(OSError):
        retention.remove_older_files(directory, generation_text(context.generation, request.sequence))
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
