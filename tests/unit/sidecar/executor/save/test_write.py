"""
The whole of: which files a pod's share of a save may write, and write again.

Called from: pytest.
"""

import dataclasses
from pathlib import Path

import pytest

from pillion import progress
from pillion.wire import events, names, policy
from pillion_sidecar import channel
from pillion_sidecar.executor import plan
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.save.write import PodWriter
from pillion_sidecar.executor.session import Context
from support import contexts

SAVE = channel.Persist(step=2, slot=0, persist=True, retention=policy.Retention())
PLAN = plan.Plan("plan", {}, {})


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return contexts.of_pod(tmp_path, protocol.LocalExchange(0))


def test_a_save_that_begins_again_elsewhere_writes_its_own_files_again(context: Context) -> None:
    """The job's store is lost after a pod has written: its save begins again from its start, on storage, with the files that it left."""
    first = PodWriter(context, SAVE, PLAN).write({})
    again = PodWriter(context, SAVE, PLAN)
    assert first["failures"] == again.write({})["failures"] == {}
    again.discard()
    assert not Path(str(context.step_folder(SAVE.step))).exists()


def test_a_file_of_the_save_s_name_that_another_wrote_is_left_alone(context: Context) -> None:
    """Names are never used twice, so that it is none of this save: the save fails, and names it."""
    mine = PodWriter(context, SAVE, PLAN)
    name = names.part_file(0, mine.generation)
    directory = Path(str(context.step_folder(SAVE.step)))
    directory.mkdir()
    (directory / name).write_text("of somebody")
    (failure,) = mine.write({})["failures"].values()
    assert name in str(failure)
    mine.discard()
    assert (directory / name).read_text() == "of somebody"


def test_what_one_save_wrote_is_nothing_that_the_next_may_write(context: Context) -> None:
    """Only the files of the save at hand are remembered: an executor lives for days."""
    PodWriter(context, SAVE, PLAN).write({})
    PodWriter(context, dataclasses.replace(SAVE, step=3), PLAN).write({})
    assert context.begun[0][0] == str(context.step_folder(3))
    assert len(context.begun[1]) == 1


def test_a_long_write_tells_how_far_it_is_and_a_short_one_tells_nothing(context: Context) -> None:
    """The supervisor logs it. The rhythm is the writer's, so that a disk of many blocks a second does not fill the channel."""
    told: list[events.Persisting] = []
    context.say = told.append
    writer = PodWriter(context, SAVE, PLAN)
    writer._size_bytes, writer._written = 100, {"a": 30, "b": 20}
    writer._tell()
    assert told == []
    writer._rhythm = progress.Rhythm(0.0)
    writer._tell()
    writer._tell()
    (only,) = told
    assert (only.step, only.written_bytes, only.size_bytes) == (SAVE.step, 50, 100)
