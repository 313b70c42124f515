"""
The whole of: a rank that leaves before its peers have sealed the save that it waits for.

Called from: pytest.
"""

from pillion.errors import ErrorDocument
from pillion.wire.policy import Overlap
from pillion_sidecar.arena.slots import SlotTable


def test_a_rank_that_leaves_first_waits_for_the_seals_of_the_others() -> None:
    """What it has sealed is still to be committed; once the others have sealed it, or one of them fails, nothing waits for them."""
    table = SlotTable(2, (0, 1), Overlap.WAIT)
    table.claim(7, 1, persist=True, destination=None)
    assert not table.awaits_others(1)
    table.sealed(7, 1)
    assert table.awaits_others(1)
    assert not table.awaits_others(0)
    table.claim(7, 0, persist=True, destination=None)
    table.sealed(7, 0)
    assert not table.awaits_others(1)
    table.claim(8, 1, persist=True, destination=None)
    table.sealed(8, 1)
    table.fail_rank(8, 0, ErrorDocument("StagingError", "no"))
    assert not table.awaits_others(1)
