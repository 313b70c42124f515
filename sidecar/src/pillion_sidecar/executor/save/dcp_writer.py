"""
One save through a DCP `StorageWriter` that the user names. Called from: `executor.worker`, one save at a time.

Each local rank and save has its own writer object, which is used in its own thread, in DCP's order of calls:

    every rank    reset(checkpoint_id), storage_meta, set_up_storage_writer, prepare_local_plan --> post "plan"
    coordinator   collect, plan and dedup, prepare_global_plan --> publish
    every rank    write_data(its plan, planner), wait for its future --> post "result"
    coordinator   collect, finish(metadata, results of all ranks) --> publish the outcome
    every pod     receive the outcome

Within a pod objects are passed as they are; between pods they are sent as documents (`executor.save.dcp_codec`). Any exception of a hook,
also a BaseException, is a failure of its rank. An exception of the coordinator's own hooks is a failure of rank 0. A timeout ends a writer
that hangs.
Source: torch 2.15, torch/distributed/checkpoint/state_dict_saver.py (`_save_state_dict`) and storage.py.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, Final, TypeVar

import torch
from torch.distributed.checkpoint import SavePlan, StorageWriter
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from pillion.errors import BarrierTimeout, RemoteFailure
from pillion.wire import layout
from pillion_sidecar import channel
from pillion_sidecar.arena import image
from pillion_sidecar.checkpoint import catalog, commit, facts, milestones, retention
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.exchange import failures as failures_module
from pillion_sidecar.executor.save import dcp_codec, writer_class
from pillion_sidecar.executor.save import persist as persist_module
from pillion_sidecar.executor.save.dcp_planner import ArenaPlanner, write_items
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage import generation as generations
from pillion_sidecar.storage.local import LocalFolder

_log = logging.getLogger(__name__)

PHASES_OF_A_DECISION: Final = 3
"""Number of phases that a pod waits for after its post: the slowest pod's hooks, the coordinator's hooks, and its decision. Each has one timeout."""

T = TypeVar("T")


# --- crossing pods -----------------------------------------------------------------------------------------------------


def _torch_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _torch_value(name: str) -> object:
    value = getattr(torch, name)
    if not isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        raise dcp_codec.CodecError(f"torch.{name} is no dtype, layout or memory format")
    return value


ATOMS: Final = (
    dcp_codec.Atom("size", torch.Size, list, torch.Size),
    dcp_codec.Atom("dtype", torch.dtype, _torch_name, _torch_value),
    dcp_codec.Atom("layout", torch.layout, _torch_name, _torch_value),
    dcp_codec.Atom("memory format", torch.memory_format, _torch_name, _torch_value),
)


# --- the save ----------------------------------------------------------------------------------------------------------


def persist(context: Context, request: channel.Persist, *, retained: bool) -> channel.Persisted:
    """
    Run one save through the writer that the destination names.

    Args:
        retained: whether the save goes to the policy's root. Then the policy's retention applies to it.

    Blocks: peer_timeout_s for the planning hooks and each agreement, persist_timeout_s for writing and for `finish`.

    Raises:
        SaveError: the save failed. Has the failures of exactly the failed ranks.
    """
    started = time.monotonic()
    phase = persist_module.phase_of(context, request.step, persist=True)
    slot_images, failures = persist_module.read_slots(context, request)
    save = _Save(context, request, phase, slot_images, retained=retained)
    try:
        plans = save.plan(failures)
        # The digests for a restore from memory are made during the writes, as in Pillion's own save.
        digesting = futures.ThreadPoolExecutor(1, "pillion-digest")
        digests = [digesting.submit(_digest, slot_image) for slot_image in slot_images.values()]
        try:
            save.write(plans)
        finally:
            digesting.shutdown()
        for rank, done in zip(slot_images, digests, strict=True):
            if done.exception() is not None:
                _log.warning("rank %d: the snapshot in memory has no digests: %s", rank, done.exception())
        durable = time.monotonic()
        if context.coordinator:
            save.conclude()
        outcome = context.exchange.receive(f"{phase}/outcome", context.persist_timeout_s * PHASES_OF_A_DECISION)
        failures_module.raise_told(outcome, request.step)
    finally:
        save.close()
    return channel.Persisted(
        path=save.path or "",
        size_bytes=int(outcome["size_bytes"]),
        persist_s=durable - started,
        commit_s=time.monotonic() - durable,
    )


def _digest(slot_image: image.SlotImage) -> None:
    image.digest_all(image.frame(slot_image))


class _Rank:
    """The writer and the planner of one local rank. One thread alone uses them."""

    def __init__(self, rank: int, planner: ArenaPlanner) -> None:
        self.rank = rank
        self.planner = planner
        self.made: StorageWriter | None = None
        self.thread = futures.ThreadPoolExecutor(1, f"pillion-rank-{rank}")

    @property
    def writer(self) -> StorageWriter:
        if self.made is None:
            raise AssertionError("the writer of this rank was not made")
        return self.made


class _Save:
    """One save of this pod. See the module."""

    def __init__(
        self,
        context: Context,
        request: channel.Persist,
        phase: str,
        slot_images: Mapping[int, image.SlotImage],
        *,
        retained: bool,
    ) -> None:
        self._context = context
        self._phase = phase
        self._slot_images = slot_images
        destination = request.destination
        if destination is None or destination.writer is None:
            raise AssertionError("a save without a writer is Pillion's own")
        self.path = destination.path
        self._step = request.step
        self._retained = retained
        self._name, self._arguments = destination.writer.name, destination.writer.arguments
        self._codec = dcp_codec.Codec(self._name, self._name.partition(":")[0], ATOMS)
        self._layouts: dict[int, layout.Layout] = {}
        """(coordinator) Rank -> its layout, for all ranks."""
        self._ranks = {
            rank: _Rank(rank, ArenaPlanner(slot_image, self._layouts)) for rank, slot_image in slot_images.items()
        }
        self._own_plans: dict[int, SavePlan] = {}
        self._own_results: dict[int, list[WriteResult]] = {}
        self._remote_items: dict[int, list[dcp_planner.WriteItem]] = {}
        self._told_plans: dict[int, Mapping[str, Any]] = {}
        self._metadata: Metadata | None = None

    def close(self) -> None:
        for rank in self._ranks.values():
            # A writer that hangs keeps its thread. No other thread waits for it.
            rank.thread.shutdown(wait=False)

    def _each(
        self, hook: Callable[[_Rank], T], bound_s: float, ranks: Sequence[int] | None = None
    ) -> tuple[dict[int, T], dict[int, RemoteFailure]]:
        """Run a hook on the local ranks in parallel. Return the results, and the failures, by rank."""
        running = {rank: self._ranks[rank].thread.submit(hook, self._ranks[rank]) for rank in ranks or self._ranks}
        done, _ = futures.wait(running.values(), timeout=bound_s)
        results: dict[int, T] = {}
        failures: dict[int, RemoteFailure] = {}
        for rank, future in running.items():
            if future not in done:
                failures[rank] = RemoteFailure("TimeoutError", f"{self._name} did not return within {bound_s:.1f} s")
            elif (err := future.exception()) is not None:
                failures[rank] = failures_module.of_exception(err)
            else:
                results[rank] = future.result()
        return results, failures

    # --- plan --------------------------------------------------------------------------------------------------------

    def plan(self, failures: dict[int, RemoteFailure]) -> dict[int, SavePlan]:
        """
        Agree on the final plans. Return those of the local ranks, as objects, in the coordinator's pod; nothing in another pod.

        Raises:
            SaveError: a rank failed, here or in another pod.
        """
        context = self._context
        self._own_plans, failed = self._each(self._local_step, context.peer_timeout_s)
        failures |= failed
        documents = {} if context.coordinator else self._encoded(self._own_plans, self._plan_document, failures)
        persist_module.publish_layouts(context, self._slot_images)
        context.exchange.post(
            f"{self._phase}/plan",
            {
                "failures": failures_module.documents(failures),
                "ranks": {str(rank): [p.layout.digest, p.opaque_lengths] for rank, p in self._slot_images.items()},
                "plans": documents,
            },
        )
        final: dict[int, SavePlan] = {}
        if context.coordinator:
            gone: list[str] = []
            planned = self._concluded(lambda: self._global_step(final, gone))
            context.exchange.publish(f"{self._phase}/plan", planned | context.agreed.notice())
            context.exchange.unpublish(gone)
        decision = context.agreed.decision(context.exchange, self._phase, context.peer_timeout_s * PHASES_OF_A_DECISION)
        failures_module.raise_told(decision, self._step)
        if not context.coordinator:
            # `write` decodes the plans. A plan that cannot be decoded is its rank's failure, and the other pods wait for that rank's result.
            self._told_plans = {rank: decision["plans"][str(rank)] for rank in self._ranks}
        return final

    def _local_step(self, rank_save: _Rank) -> SavePlan:
        writer = rank_save.made = writer_class.find(self._name)(**self._arguments)
        coordinator = rank_save.rank == 0
        if self.path is not None:
            writer.reset(self.path)
        rank_save.planner.set_up_planner({}, storage_meta=writer.storage_meta(), is_coordinator=coordinator)
        writer.set_up_storage_writer(coordinator, **_accepted(writer, rank=rank_save.rank, use_collectives=True))
        plan: SavePlan = writer.prepare_local_plan(rank_save.planner.create_local_plan())
        return plan

    def _plan_document(self, rank: int, plan: SavePlan) -> dict[str, Any]:
        return self._codec.encode_plan(plan, self._ranks[rank].planner.items, self._slot_images[rank].layout.paths)

    def _encoded(
        self, own: Mapping[int, T], encode: Callable[[int, T], Any], failures: dict[int, RemoteFailure]
    ) -> dict[str, Any]:
        """Return documents of the local ranks' objects for another pod. An object that cannot be sent is a failure of its rank."""
        documents = {}
        for rank, value in own.items():
            try:
                documents[str(rank)] = encode(rank, value)
            except Exception as err:  # a boundary: a writer's objects may raise any error
                failures[rank] = failures_module.of_exception(err)
        return documents

    def _global_step(self, final: dict[int, SavePlan], gone: list[str]) -> dict[str, Any]:
        """(coordinator) Return the plan for all ranks. `final` gets the plans of the local ranks, `gone` the names to unpublish."""
        context = self._context
        documents = context.exchange.collect(f"{self._phase}/plan", context.peer_timeout_s)
        # Every pod is here, so every pod has left the save before. Its keys can be deleted.
        context.forget_finished()
        context.finished_phases += [f"{self._phase}/{name}" for name in ("plan", "result")]
        context.finished_names.append(f"{self._phase}/outcome")
        failures = failures_module.collect(documents)
        ranks = {int(rank): entry for document in documents.values() for rank, entry in document["ranks"].items()}
        gone += context.agreed.settle({rank: str(entry[0]) for rank, entry in ranks.items()})
        if failures:
            return {"failures": failures_module.documents(failures)}
        plans = dict(self._own_plans)
        for document in documents.values():
            for rank, (name, lengths) in ((int(r), entry) for r, entry in document["ranks"].items()):
                self._layouts[rank] = rank_layout = persist_module.find_layout(context, name)
                if rank not in plans:
                    self._remote_items[rank] = write_items(rank_layout, lengths)
                    plan_document = document["plans"][str(rank)]
                    plans[rank] = SavePlan(
                        **self._codec.decode_plan(plan_document, self._remote_items[rank], rank_layout.paths)
                    )
        planned, self._metadata = self._ranks[0].planner.create_global_plan([plans[rank] for rank in sorted(plans)])

        def prepare(lead: _Rank) -> list[SavePlan]:
            made = lead.writer.prepare_global_plan(planned)
            if len(made) != len(planned):
                raise ValueError(f"{self._name}.prepare_global_plan made {len(made)} plans for {len(planned)} ranks")
            return made

        prepared, failures = self._each(prepare, context.peer_timeout_s, [0])
        if failures:
            return {"failures": failures_module.documents(failures)}
        by_rank = dict(enumerate(prepared[0]))
        final.update({rank: by_rank[rank] for rank in self._ranks})
        return {
            "failures": {},
            "plans": {
                str(rank): self._codec.encode_plan(by_rank[rank], items, self._layouts[rank].paths)
                for rank, items in self._remote_items.items()
            },
        }

    # --- write, finish -----------------------------------------------------------------------------------------------

    def write(self, plans: Mapping[int, SavePlan]) -> None:
        """Write the plan of every local rank, and post the results. Never raises for an error of a writer."""

        def write(rank_save: _Rank) -> list[WriteResult]:
            plan = plans.get(rank_save.rank) or self._told_plan(rank_save)
            written = rank_save.writer.write_data(rank_save.planner.finish_plan(plan), rank_save.planner)
            written.wait()
            # The result is passed on unchanged: only the writer's own `finish` knows its content.
            returned: list[WriteResult] = written.value()
            return returned

        self._own_results, failures = self._each(write, self._context.persist_timeout_s)
        documents: dict[str, Any] = {}
        if not self._context.coordinator:
            documents = self._encoded(self._own_results, lambda _, results: self._codec.encode(results), failures)
        self._context.exchange.post(
            f"{self._phase}/result", {"failures": failures_module.documents(failures), "results": documents}
        )

    def _told_plan(self, rank_save: _Rank) -> SavePlan:
        paths = self._slot_images[rank_save.rank].layout.paths
        return SavePlan(**self._codec.decode_plan(self._told_plans[rank_save.rank], rank_save.planner.items, paths))

    def conclude(self) -> None:
        """(coordinator) Call `finish` if every rank has written, and publish the outcome to every pod."""
        outcome = self._concluded(self._finish)
        self._context.exchange.publish(f"{self._phase}/outcome", outcome)

    def _finish(self) -> dict[str, Any]:
        context = self._context
        documents = context.exchange.collect(f"{self._phase}/result", context.persist_timeout_s)
        failures = failures_module.collect(documents)
        if failures:
            return {"failures": failures_module.documents(failures)}
        results = dict(self._own_results)
        for document in documents.values():
            for rank, encoded in document["results"].items():
                results[int(rank)] = self._codec.decode(encoded)
        if context.root is not None:
            commit.fence(context.root, context.generation)

        def finish(lead: _Rank) -> None:
            if self._metadata is None:
                raise AssertionError("finish before the global plan")
            lead.writer.finish(metadata=self._metadata, results=[results[rank] for rank in sorted(results)])

        _, failures = self._each(finish, context.persist_timeout_s, [0])
        if self._retained and not failures:
            self._note(generations.text(context.generation, generations.save_number(context.epoch, rescued=False)))
        return {"failures": failures_module.documents(failures), "size_bytes": count_bytes(results.values())}

    def _note(self, generation: str) -> None:
        """Note the commit in the root's milestones, and remove checkpoints that the policy does not keep."""
        context = self._context
        root = LocalFolder(str(context.own_root()))
        milestones.remember(root, self._step, generation)
        milestones.note_written(root, self._step, generation, os.listdir(str(context.step_folder(self._step))))
        _retain(context, root, self._step)

    def _concluded(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the coordinator's decision. An error becomes a decision with failures, because the peers wait for a decision."""
        try:
            return decide()
        except BarrierTimeout as err:
            missing = failures_module.documents(failures_module.of_missing(err))
            return {"failures": missing, "phase": err.phase, "waited_s": err.waited_s}
        except plan_module.PlanError as err:
            return {
                "failures": failures_module.documents({rank: failures_module.of_exception(err) for rank in err.ranks})
            }
        except Exception as err:  # a boundary: see the docstring
            return {"failures": failures_module.documents({0: failures_module.of_exception(err)})}


def count_bytes(results: Iterable[object]) -> int:
    """
    Return the sum of the sizes in the ranks' write results, bytes. Pure.

    DCP types the results as lists of `WriteResult` and never reads them. So a writer may return anything. A result without a size counts as 0.
    """
    of_ranks = (each for each in results if isinstance(each, Iterable))
    sizes = (getattr(result, "size_in_bytes", 0) for each in of_ranks for result in each)
    return sum(size for size in sizes if isinstance(size, int) and size > 0)


def _retain(context: Context, root: LocalFolder, current: int) -> None:
    """Remove checkpoints that the policy does not keep. A folder without DCP's marker belongs to the writer, and stays."""
    keep = retention.kept_whatever_the_policy(root)
    known = facts.Known().read(root, catalog.committed(root))
    chosen = retention.judge(known, context.retention, current=current, keep=keep)
    for step in chosen:
        try:
            for _ in retention.remove_written(root, step):
                context.watch.moved()
        except OSError as err:
            _log.warning(
                "retention: step %d could not be removed, and is tried again after the next commit: %s", step, err
            )


def _accepted(writer: StorageWriter, **offered: object) -> dict[str, object]:
    """Return the keyword arguments that the writer's `set_up_storage_writer` takes: older writers take none (torch < 2.9)."""
    parameters = inspect.signature(writer.set_up_storage_writer).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}
