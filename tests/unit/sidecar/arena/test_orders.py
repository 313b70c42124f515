"""
The whole of: when what a pod holds in memory was sealed, as far as a load needs it.

Called from: pytest.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pillion.wire import arena, control, policy
from pillion_sidecar.arena.pod_arena import MAX_EPOCH, Identity, PodArena
from pillion_sidecar.arena.slots import Save, SaveState

SESSION = "a" * 32


def pod(folder: Path, *, session: str = SESSION, world_size: int = 1) -> PodArena:
    ranks = tuple(range(world_size))
    hello = control.Hello(session=session, run_id="r", rank=0, world_size=world_size, pods=(ranks,))
    of = policy.parse({"staging": {"slots": 3}}, embedded=True)
    return PodArena(str(folder), Identity.from_hello(hello, root=str(folder)), of)


def seal(of: PodArena, step: int) -> Save:
    """A save that the one rank has filled and sealed, as a client does it that does not know of orders."""
    of.table.claim(step, 0, persist=True)
    save = of.table.saves[step]
    of.table.date(save, of.order)
    of.grow(0, save.slot, arena.PAGE_BYTES * 2)
    of.begin_fill(0, save.slot, persist=True)
    header = of.segments[0].read_header(save.slot)
    fields = {
        "state": arena.SlotState.SEALED,
        "step": step,
        "world_size": len(of.segments),
        "session": bytes.fromhex(SESSION),
        "digests_for": header.sequence,
    }
    sealed = {name: getattr(header, name) for name in header.__slots__} | fields
    of.segments[0].write_header(save.slot, arena.SlotHeader(**sealed))
    of.table.sealed(step, 0)
    return save


@pytest.fixture
def first(tmp_path: Path) -> Iterator[PodArena]:
    made = pod(tmp_path)
    yield made
    made.close()


def found_by(folder: Path, session: str, order: tuple[int, int]) -> dict[int, Save]:
    """The saves that the pod of another sidecar adopts, once its executor has opened the session."""
    successor = pod(folder, session=session)
    successor.date(order)
    successor.close()
    return successor.table.saves


def test_a_snapshot_keeps_its_order_through_restarts(first: PodArena, tmp_path: Path) -> None:
    """It is in the slot's header, from the claim on."""
    first.date((4, 1))
    seal(first, 7)
    first.date((4, 2))
    seal(first, 5)
    assert {step: save.born for step, save in found_by(tmp_path, "b" * 32, (5, 0)).items()} == {7: (4, 1), 5: (4, 2)}


def test_what_was_sealed_before_anybody_knew_the_generation_is_dated_later(first: PodArena, tmp_path: Path) -> None:
    """By the session itself as of its own; by the next session as newer than all that was committed before that."""
    save = seal(first, 7)
    assert save.born is None
    assert found_by(tmp_path, "b" * 32, (5, 0))[7].born == (4, MAX_EPOCH)
    assert found_by(tmp_path, SESSION, (4, 0))[7].born == (4, 0)
    first.date((4, 0))
    assert save.born == (4, 0)
    first.mark(save, arena.SlotState.SEALED)
    assert found_by(tmp_path, "b" * 32, (5, 0))[7].born == (4, 0)


def test_a_load_sets_newer_snapshots_aside_until_another_one_goes_to_them(first: PodArena, tmp_path: Path) -> None:
    """None of them is rescued any more, by no successor either; a load by its number finds it, and training goes on from it again."""
    first.date((4, 0))
    for step in (2, 3, 5):
        save = seal(first, step)
        first.table.start_persist(save)
        first.table.finish(save, persisted=False)
    first.set_aside(((4, 0), 2))
    newest = first.table.newest_complete()
    assert newest is not None
    assert newest.step == 2, "nothing else is owed to storage at the end"
    assert {step for step, save in first.table.saves.items() if save.set_aside} == {3, 5}
    adopted = found_by(tmp_path, SESSION, (4, 1))
    assert {step for step, save in adopted.items() if save.set_aside} == {3, 5}
    assert first.table.restorable().keys() == {2, 3, 5}
    first.set_aside(((4, 0), 3))
    assert {step for step, save in found_by(tmp_path, SESSION, (4, 1)).items() if save.set_aside} == {5}
    assert first.table.saves[5].state is SaveState.DONE


def test_a_snapshot_of_another_world_is_named_until_its_slot_is_needed(first: PodArena, tmp_path: Path) -> None:
    """Trainers that start again get the same error, and never start from nothing in silence."""
    first.date((4, 0))
    slot = seal(first, 5).slot
    for _ in range(2):
        larger = pod(tmp_path, session="c" * 32, world_size=2)
        assert [(each.step, each.world_size, each.order) for each in larger.strangers.values()] == [(5, 1, (4, 0))]
        assert larger.table.saves == {}
        larger.close()
    larger = pod(tmp_path, session="c" * 32, world_size=2)
    larger.reset(slot)
    assert larger.strangers == {}
    larger.close()
