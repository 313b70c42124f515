"""
The whole of: which steps a Checkpointer refuses, in plain words.

Called from: pytest.
"""

from pillion import checkpointer


def test_a_refused_step_is_compared_with_one_that_the_caller_has_seen() -> None:
    """Behind a load of step 3 that is 3, though 3 itself may be saved again."""
    assert checkpointer._too_old(1, 3, loaded=True).startswith("step 1 is older than step 3, which was loaded; load()")
    assert checkpointer._too_old(1, 3, loaded=False).startswith("step 1 comes after step 3: steps only grow; load()")
