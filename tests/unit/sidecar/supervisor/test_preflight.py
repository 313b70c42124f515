"""
The whole of: when an arena is too small, before a save is lost.

Called from: pytest.
"""

import pytest

from pillion_sidecar.supervisor import preflight

MIB = 2**20


@pytest.mark.parametrize(
    ("rooms", "num_ranks", "limit_mib", "fits"),
    [
        ({}, 4, 1, True),
        ({0: 100 * MIB}, 1, 200, True),
        ({0: 100 * MIB}, 1, 199, False),
        ({0: 100 * MIB}, 2, 399, False),
        ({0: 100 * MIB, 1: 10 * MIB}, 2, 220, True),
    ],
    ids=[
        "nobody has said",
        "exactly",
        "the second save",
        "a rank that has not said counts as one that has",
        "each its own",
    ],
)
def test_all_slots_of_all_ranks_have_to_fit(rooms: dict[int, int], num_ranks: int, limit_mib: int, fits: bool) -> None:
    """One slot that fits is no arena: the save beside it would be lost."""
    found = preflight.too_small(rooms, num_ranks=num_ranks, slots=2, bounds={"staging.sizeLimit": limit_mib * MIB})
    assert (found == "") is fits


def test_the_tightest_bound_is_named_with_what_is_needed() -> None:
    """A person reads what to raise, and to how much."""
    bounds = {
        "staging.sizeLimit": 300,
        "the memory limit of the sidecar's container": 150,
        "the tmpfs that it is on": 200,
    }
    found = preflight.too_small({0: 100}, num_ranks=1, slots=2, bounds=bounds)
    assert found == (
        "the state needs 200 bytes of arena (staging.slots: 2, ranks in this pod: 1), and the memory limit of the sidecar's"
        " container allows 150: saves will fail"
    )
