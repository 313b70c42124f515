"""
The whole of: what the pods of a job keep in their slots when a load comes, where they have not heard the same.

Called from: pytest.
"""

import dataclasses
from pathlib import Path

import pytest

from pillion.wire import arena, policy
from pillion.wire.policy import Overlap
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.arena.slots import Granted, MustWait, SlotTable
from support.identities import identity

STORE = ("127.0.0.1", 1)
"""Nobody asks it."""


def pod(*, heard: bool) -> SlotTable:
    """Two slots; 70 is on storage, 72 and 74 are snapshots that every pod holds; `heard`: the pod knows it of 74."""
    table = SlotTable(2, [0], Overlap.WAIT, alone=False)
    for step in (70, 72, 74):
        granted = table.claim(step, 0, persist=step == 70)
        assert isinstance(granted, Granted)
        save = table.sealed(step, 0)
        assert save is not None
        table.start_persist(save)
        table.finish(save, persisted=step == 70, concluded=step != 74 or heard)
    return table


def test_pods_that_heard_different_things_still_hold_one_snapshot_in_common() -> None:
    """Neither drops one for the load: each would drop what the other keeps (campaign, seed 1839: back to storage)."""
    pods = [pod(heard=True), pod(heard=False)]
    assert [table.lend() for table in pods] == [None, None]
    assert all(table.crowded() for table in pods)
    assert set.intersection(*(set(table.restorable()) for table in pods)) == {72, 74}


def test_a_slot_that_a_load_takes_is_lent_until_it_is_given_back() -> None:
    """What it held is not offered any more, no save gets it meanwhile, and afterwards it is free."""
    table = pod(heard=True)
    slot = table.restorable()[72]
    table.take(slot)
    assert table.restorable() == {74: 1 - slot}
    assert not isinstance(table.claim(76, 0, persist=False), Granted)
    assert not table.crowded()
    table.give_back(slot)
    assert isinstance(table.claim(76, 0, persist=False), Granted)


def restarted(folder: Path) -> PodArena:
    """A pod of two whose trainers came back; its two slots have snapshot 18, which all pods hold, and 20, whose persist was cut short."""
    before = PodArena(str(folder), identity("a" * 32, folder, STORE), policy.parse({}, embedded=True))
    for slot, step, flags in ((0, 18, arena.Flag.SNAPSHOT | arena.Flag.CONCLUDED), (1, 20, arena.Flag.NONE)):
        state = arena.SlotState.SEALED if step == 18 else arena.SlotState.PERSISTING
        header = before.segments[0].read_header(slot)
        sealed = dataclasses.replace(header, state=state, flags=flags, step=step, sealed_ns=step, world_size=2)
        before.segments[0].write_header(slot, dataclasses.replace(sealed, session=bytes.fromhex("a" * 32)))
    before.close()
    return PodArena(str(folder), identity("b" * 32, folder, STORE), policy.parse({}, embedded=True))


@pytest.mark.parametrize("persisted", [False, True], ids=["by a load from memory", "by a rescue"])
def test_a_snapshot_that_all_pods_are_found_to_hold_makes_room_for_the_next_save(
    tmp_path: Path, persisted: bool
) -> None:
    """
    The pod was stopped before it could hear that 20 is whole everywhere, or committed: it would keep 18 for its peers for ever, and
    training would wait for a slot (campaign, seed 40263).
    """
    pod = restarted(tmp_path)
    assert sorted(pod.table.restorable()) == [18, 20]
    assert isinstance(pod.table.claim(22, 0, persist=False), MustWait)
    pod.held_by_all(20, persisted=persisted)
    granted = pod.table.claim(22, 0, persist=False)
    assert isinstance(granted, Granted)
    assert sorted(pod.table.restorable()) == [20]
    flags = pod.segments[0].read_header(pod.table.saves[20].slot).flags
    assert arena.Flag.CONCLUDED in flags
    assert (arena.Flag.PERSISTED in flags) is persisted
    pod.close()
