"""
The whole of: commits, interrupted commits, retention and fencing on a real folder, against a model that is obviously right: which steps
are committed, and by which attempt.

Called from: pytest.
Must never: look into the folder to decide what to expect, but for one thing: whether a crash came before or after the commit marker.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pillion.errors import CommitError
from pillion.wire import layout, manifest, names
from pillion.wire.policy import Retention
from pillion_sidecar.checkpoint import catalog, commit, milestones, retention
from pillion_sidecar.storage import archive, digest, durable
from pillion_sidecar.storage.local import LocalFolder
from support import file_operations
from support.parts import begin_session

WORLD: Final = 2
ITEMS: Final = 64
POLICY: Final = Retention(keep_last=2)
MAX_OPERATIONS: Final = 96
"""More file operations than fence, commit and retention of one save have."""
IN_MEMORY: Final = "/dev/shm"
"""Where syncing costs nothing; what it does for durability no test can see without cutting the power."""


def value(step: int, generation: int, rank: int) -> int:
    """What every byte of a rank's chunk is: other for each step and attempt, so that a mixture shows."""
    return (step * 37 + generation * 11 + rank) % 251


class Storage(RuleBasedStateMachine):
    """
    Attempts of one job, one after the other, on one folder. Each may crash anywhere, and one that was stopped may come back when its
    successor works already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="pillion-commits-", dir=IN_MEMORY if os.path.isdir(IN_MEMORY) else None)
        os.makedirs(os.path.join(self.root, names.INTERNAL_DIR))
        self.committed: dict[int, set[int]] = {}
        """Step -> the attempts of which one has committed it: one, but for a moment after a crash."""
        self.maybe: set[int] = set()
        """Steps that a removal was cut short at: whole, or gone."""
        self.complete: dict[int, set[int]] = {}
        """Step -> attempts that left a part of every rank."""
        self.generation = begin_session(self.root)
        self.position = 0
        self.was_cut = True
        """Whether the last crash or stop came before the end of the work."""

    # --- what an attempt does, in the order of `executor.save.commit` ---------------------------------------------------

    def folder(self, step: int) -> Path:
        return Path(self.root, names.step_directory(step))

    def write_rank(self, step: int, generation: int, rank: int) -> None:
        """One pod's data, and its part behind it."""
        payload = bytes([value(step, generation, rank)]) * ITEMS
        data = archive.head("uint8", (ITEMS,), ITEMS) + payload + archive.tail("uint8", (ITEMS,), ITEMS)
        file = names.data_file(rank, 0, str(generation))
        os.makedirs(self.folder(step), exist_ok=True)
        durable.replace_file(self.folder(step) / file, data)
        chunk = manifest.StoredChunk(
            "w", "uint8", (ITEMS * WORLD,), (ITEMS * rank,), (ITEMS,), file, 0, len(data), digest.digest(data)
        )
        part = manifest.Part(
            step=step, generation=str(generation), run_id="r", world_size=WORLD, plan_id="p", ranks=(rank,),
            files={file: len(data)}, chunks=(chunk,), opaque=(), paths={"w": ("w",)},
        )  # fmt: skip
        durable.replace_file(self.folder(step) / names.part_file(rank, str(generation)), part.encode())

    def conclude(self, step: int, generation: int) -> None:
        """Fence, commit, remember, and retention."""
        commit.fence(LocalFolder(self.root), generation)
        chunks: list[manifest.StoredChunk] = []
        parts: list[manifest.PartReference] = []
        files: dict[str, int] = {}
        for rank in range(WORLD):
            name = names.part_file(rank, str(generation))
            data = (self.folder(step) / name).read_bytes()
            parts.append(manifest.PartReference(name, (rank,), digest.digest(data), len(data)))
            part = manifest.decode_part(data)
            chunks += part.chunks
            files |= {**part.files, name: len(data)}
        metadata = commit.build_metadata(chunks, [], {"w": ("w",)})
        made = commit.make_manifest(
            step=step, generation=str(generation), run_id="r", world_size=WORLD, plan_id="p", parts=parts, size_bytes=1,
            metadata=metadata,
        )  # fmt: skip
        # A local folder shows every name at once.
        commit.publish(LocalFolder(str(self.folder(step))), made, metadata, files, late_s=0.0)
        milestones.remember(LocalFolder(self.root), step, str(generation))
        retention.remove_older_files(LocalFolder(str(self.folder(step))), str(generation))
        retention.apply(LocalFolder(self.root), POLICY, current=step, generation=generation)

    def has_marker(self, step: int) -> bool:
        return (self.folder(step) / names.COMMIT_MARKER).exists()

    # --- the model -----------------------------------------------------------------------------------------------------

    def model_commit(self, step: int, generation: int) -> None:
        self.committed[step] = {generation}
        self.maybe.discard(step)

    def model_retention(self, current: int, *, surely: bool) -> None:
        """What the policy does not keep goes, or may go."""
        kept = [step for step in self.line() if step <= current][-(POLICY.keep_last or 0) :]
        for step in [step for step in self.committed if step <= current and step not in kept and step != self.newest()]:
            if surely:
                del self.committed[step]
                self.maybe.discard(step)
            else:
                self.maybe.add(step)
        for step in [step for step in self.complete if step < current and step not in self.committed]:
            del self.complete[step]

    def committed_at(self, step: int) -> tuple[int, int]:
        """Of two steps the one with the larger value was committed later."""
        return max(self.committed[step]), step

    def newest(self) -> int:
        return max(self.committed, key=self.committed_at)

    def line(self) -> list[int]:
        """The steps that training did not go back behind."""
        return [
            step
            for step in sorted(self.committed)
            if all(each > step for each in self.committed if self.committed_at(each) > self.committed_at(step))
        ]

    def model_finish(self) -> None:
        """Whatever is complete and not committed is committed, by the newest attempt that completed it."""
        for step, generations in self.complete.items():
            if step not in self.committed and generations:
                self.model_commit(step, max(generations))

    # --- rules -----------------------------------------------------------------------------------------------------------

    @rule(back=st.integers(0, 4))
    def restart(self, back: int) -> None:
        """A new attempt: claims its generation, finishes what is complete, goes on from a step of the line, or from the start."""
        self.generation = begin_session(self.root)
        self.settle()
        finished = catalog.finish_interrupted(LocalFolder(self.root))
        known = set(self.committed)
        self.model_finish()
        assert set(finished) == set(self.committed) - known
        steps = self.line()
        self.position = steps[-1 - back] if back < len(steps) else 0

    @rule()
    def save(self) -> None:
        """Every rank writes, the coordinator commits and retains."""
        step = self.position = self.position + 1
        self.settle()
        for rank in range(WORLD):
            self.write_rank(step, self.generation, rank)
        self.complete.setdefault(step, set()).add(self.generation)
        self.conclude(step, self.generation)
        self.model_commit(step, self.generation)
        self.complete[step] = {self.generation}
        self.model_retention(step, surely=True)

    @rule(ranks=st.integers(0, WORLD - 1), before=st.integers(0, MAX_OPERATIONS))
    def crash_while_writing(self, ranks: int, before: int) -> None:
        """Some ranks have written, the next one ends in the middle."""
        step = self.position + 1
        self.settle()
        for rank in range(ranks):
            self.write_rank(step, self.generation, rank)
        crashed = file_operations.crash(
            lambda: self.write_rank(step, self.generation, ranks), self.root, before=before % 8
        )
        part = names.part_file(WORLD - 1, str(self.generation))
        if ranks == WORLD - 1 and (not crashed or (self.folder(step) / part).exists()):
            self.complete.setdefault(step, set()).add(self.generation)

    @rule(before=st.integers(0, MAX_OPERATIONS))
    def crash_while_committing(self, before: int) -> None:
        """Every rank has written; the coordinator ends between two file operations of fence, commit and retention."""
        step = self.position + 1
        self.settle()
        for rank in range(WORLD):
            self.write_rank(step, self.generation, rank)
        self.complete.setdefault(step, set()).add(self.generation)
        earlier = self.committed.get(step, set())
        self.was_cut = file_operations.crash(lambda: self.conclude(step, self.generation), self.root, before=before)
        if self.has_marker(step):
            # It is there: of this attempt, or still the one before where the directory was written again.
            self.committed[step] = earlier | {self.generation}
            self.model_retention(step, surely=False)
        else:
            assert not earlier, "a crash took a committed checkpoint away"

    @precondition(lambda self: self.generation > 1)
    @rule()
    def an_older_attempt_tries(self) -> None:
        """It comes to its commit when a newer one has begun: it is fenced off, and changes nothing that is committed."""
        step, generation = self.position + 1, self.generation - 1
        self.settle()
        for rank in range(WORLD):
            self.write_rank(step, generation, rank)
        self.complete.setdefault(step, set()).add(generation)
        with pytest.raises(CommitError):
            self.conclude(step, generation)

    @rule(before=st.integers(0, MAX_OPERATIONS), successor_saves=st.integers(0, 3), back=st.integers(0, 4))
    def a_stopped_attempt_comes_back(self, before: int, successor_saves: int, back: int) -> None:
        """The coordinator is stopped anywhere in its commit; a successor begins, goes back, saves; then it goes on."""
        step, generation = self.position + 1, self.generation
        self.settle()
        for rank in range(WORLD):
            self.write_rank(step, generation, rank)
        self.complete.setdefault(step, set()).add(generation)
        earlier = self.committed.get(step, set())
        stalled = file_operations.Stalled(lambda: self.conclude(step, generation), self.root, before=before)
        try:
            self.was_cut = not stalled.ended
            if stalled.ended:
                assert stalled.error is None
                self.model_commit(step, generation)
                self.model_retention(step, surely=True)
                self.position = step
                return
            if self.has_marker(step):
                self.committed[step] = earlier | {generation}
                # It may be anywhere in its retention, and goes on with it later.
                self.model_retention(step, surely=False)
            self.restart(back)
            for _ in range(successor_saves):
                self.save()
        finally:
            stalled.finish()
        assert stalled.error is None or isinstance(stalled.error, CommitError | OSError)
        if self.has_marker(step) and max(self.committed.get(step, {0})) <= generation:
            # Begun before its successor was there, and not in that one's way.
            self.committed[step] = self.committed.get(step, set()) | {generation}
        # What it had decided to remove, it may remove: of its own time, and never the newest.
        for each, generations in self.committed.items():
            if each < step and max(generations) <= generation and each != self.newest():
                self.maybe.add(each)

    # --- what holds ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Resolve what a crash left open: by what can be read, which has to be one of the two."""
        for step in sorted(self.maybe):
            if step in self.committed and not self.has_marker(step):
                assert step != self.newest(), "the newest committed checkpoint was removed"
                del self.committed[step]
                self.complete.pop(step, None)
        self.maybe.clear()
        for step, generations in self.committed.items():
            if len(generations) > 1:
                self.committed[step] = {self.read(step)}

    def read(self, step: int) -> int:
        """Read a committed checkpoint as the loader does; the attempt that its bytes are of."""
        stored = catalog.read(LocalFolder(str(self.folder(step))), step)
        found = set()
        chunks = stored.chunks["w"]
        assert sorted(chunk.offsets for chunk in chunks) == [(ITEMS * rank,) for rank in range(WORLD)]
        for chunk in chunks:
            rank, _, generation = names.parse_data_file(chunk.file) or (-1, -1, "")
            data = (self.folder(step) / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.length]
            assert digest.digest(data) == chunk.digest
            payload = data[layout.HEAD_BYTES : layout.HEAD_BYTES + ITEMS]
            assert payload == bytes([value(step, int(generation), rank)]) * ITEMS
            found.add(int(generation))
        assert len(found) == 1, "a checkpoint of two attempts"
        return found.pop()

    @invariant()
    def every_committed_checkpoint_is_there_and_whole(self) -> None:
        """And of the attempt that committed it last; nothing else is committed."""
        on_storage = {step for step, done in catalog.steps(LocalFolder(self.root)).items() if done}
        assert on_storage - self.maybe == set(self.committed) - self.maybe
        assert not self.committed or self.newest() in on_storage, "the newest committed checkpoint is gone"
        for step in on_storage:
            assert self.read(step) in self.committed[step]

    @precondition(lambda self: self.committed)
    @rule()
    def stock_dcp_reads_the_newest(self) -> None:
        """As `torch.distributed.checkpoint.load` without us."""
        step = self.newest()
        state = {"w": torch.zeros(ITEMS * WORLD, dtype=torch.uint8)}
        dcp.load(state, checkpoint_id=str(self.folder(step)), no_dist=True)
        found = [
            [value(step, generation, rank) for rank in range(WORLD) for _ in range(ITEMS)]
            for generation in self.committed[step]
        ]
        assert state["w"].tolist() in found

    def teardown(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


TestStorage = Storage.TestCase
TestStorage.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize(("rewind", "back"), [(0, 0), (0, 1), (0, 9), (1, 0), (1, 1), (2, 2), (2, 9)])
def test_an_older_attempt_stopped_before_any_file_operation_does_no_harm_when_it_comes_back(
    rewind: int, back: int
) -> None:
    """
    At every place once: the successor has meanwhile gone back and written the same steps again, or gone on with others. `rewind`: the
    older attempt itself writes a step again that one before it has committed.
    """
    for before in range(MAX_OPERATIONS):
        job = Storage()
        try:
            for _ in range(3):
                job.save()
            if rewind:
                job.restart(rewind)
            job.a_stopped_attempt_comes_back(before, 2, back)
            job.every_committed_checkpoint_is_there_and_whole()
            job.save()
            job.every_committed_checkpoint_is_there_and_whole()
        finally:
            job.teardown()
        if not job.was_cut:
            return
    pytest.fail(f"there are more than {MAX_OPERATIONS} operations: some places were not tried")


@pytest.mark.parametrize("rewind", [0, 1, 2])
def test_a_crash_before_any_file_operation_leaves_the_one_before_and_the_next_run_finishes(rewind: int) -> None:
    """At every place of fence, commit and retention once, in a new folder and in one that is written again."""
    for before in range(MAX_OPERATIONS):
        job = Storage()
        try:
            for _ in range(3):
                job.save()
            if rewind:
                job.restart(rewind)
            job.crash_while_committing(before)
            job.every_committed_checkpoint_is_there_and_whole()
            job.restart(0)
            job.every_committed_checkpoint_is_there_and_whole()
            job.save()
            job.every_committed_checkpoint_is_there_and_whole()
        finally:
            job.teardown()
        if not job.was_cut:
            return
    pytest.fail(f"there are more than {MAX_OPERATIONS} operations: some places were not tried")
