"""
The whole of: what the pods of a job keep in their slots when a load comes, where they have not heard the same.

Called from: pytest.
"""

from pillion.wire.policy import Overlap
from pillion_sidecar.arena.slots import Granted, SlotTable


def pod(*, heard: bool) -> SlotTable:
    """Two slots; 70 is on storage, 72 and 74 are snapshots that every pod holds; `heard`: the pod knows it of 74."""
    table = SlotTable(2, [0], Overlap.WAIT, alone=False)
    for step in (70, 72, 74):
        granted = table.claim(step, 0, persist=step == 70)
        assert isinstance(granted, Granted)
        save = table.sealed(step, 0)
        assert save is not None
        table.start_persist(save)
        save.concluded = step != 74 or heard
        table.finish(save, persisted=step == 70)
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
