"""
What the executor knows of snapshots that it verified while no trainer lived.

Called from: pytest.
"""

import time
from types import SimpleNamespace
from typing import cast

import pytest

from pillion.wire import arena
from pillion.wire.layout import Item, Layout
from pillion_sidecar.arena import image
from pillion_sidecar.executor import checked
from pillion_sidecar.storage import digest

LAYOUT = Layout(tuple(Item(f"w{n}", "uint8", (64,), (0,), (64,)) for n in range(3)), (), {})
IMAGE_BYTES = LAYOUT.end(2)


def snapshot(*, sequence: int = 7, damaged: int | None = None, digested: bool = True) -> image.SlotImage:
    """A snapshot of three tensors with their digests, one of them changed since."""
    memory = bytearray(b"\x5a" * IMAGE_BYTES)
    table = bytearray()
    for index in range(3):
        start, end = LAYOUT.starts[index], LAYOUT.end(index)
        table += bytes.fromhex(digest.digest(memoryview(memory)[start:end]))
    if damaged is not None:
        memory[LAYOUT.starts[damaged]] ^= 1
    header = SimpleNamespace(
        sequence=sequence,
        sealed_ns=11,
        digests_for=sequence if digested else sequence - 1,
        digests_count=3,
        digests_offset=0,
    )
    made = SimpleNamespace(
        segment=SimpleNamespace(path="/segment-0", slot=lambda _: memoryview(table)),
        slot=1,
        header=header,
        layout=LAYOUT,
        opaque_starts=(),
        opaque_lengths=(),
        num_leaves=3,
        memory=memoryview(memory),
    )
    assert len(table) == 3 * arena.DIGEST_BYTES
    return cast("image.SlotImage", made)


def never() -> bool:
    return False


def test_a_whole_snapshot_has_nothing_left_to_verify() -> None:
    """All of its archives are known to match, for that seal and for no other."""
    known = checked.Checked()
    assert known.verify([snapshot()], interrupted=never)
    assert known.count(snapshot()) == 3
    assert known.count(snapshot(sequence=8)) == 0


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_what_does_not_match_is_left_to_the_load(damaged: int) -> None:
    """The load begins with the archive that did not match, and says which one it is."""
    known = checked.Checked()
    assert not known.verify([snapshot(damaged=damaged)], interrupted=never)
    assert known.count(snapshot()) == damaged


def test_a_snapshot_without_digests_is_not_verified() -> None:
    """Its sidecar was killed before it had computed them, so nothing can be said of its bytes."""
    known = checked.Checked()
    assert not known.verify([snapshot(digested=False)], interrupted=never)
    assert known.count(snapshot(digested=False)) == 0


def test_the_next_request_ends_a_verification() -> None:
    """After the archive that it is at; the load does the rest."""
    answers = iter([False, False, True])
    known = checked.Checked()
    assert not known.verify([snapshot()], interrupted=lambda: next(answers))
    assert known.count(snapshot()) == 2


def test_a_verification_is_trusted_until_a_save_or_load_and_no_longer_than_its_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A living trainer has the arena mapped, so what was verified before it says nothing any more."""
    known = checked.Checked()
    known.verify([snapshot()], interrupted=never)
    known.forget()
    assert known.count(snapshot()) == 0
    known.verify([snapshot()], interrupted=never)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + checked.TRUSTED_S)
    assert known.count(snapshot()) == 0
