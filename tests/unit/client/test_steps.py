"""
The whole of: which steps a Checkpointer takes and refuses, in plain words.

Called from: pytest.
"""

import numpy
import pytest
import torch

import pillion
from pillion import steps


def test_a_refused_step_is_compared_with_one_that_the_caller_has_seen() -> None:
    """Behind a load of step 3 that is 3, though 3 itself may be saved again."""
    assert steps.too_old(1, 3, loaded=True).startswith("step 1 is older than step 3, which was loaded; load()")
    assert steps.too_old(1, 3, loaded=False).startswith("step 1 comes after step 3: steps must increase; load()")


def test_a_step_is_any_whole_number_from_zero_on() -> None:
    """NumPy's and torch's integers count as Python's; what is negative, too large, no whole number, or a bool is named and refused."""
    taken = [0, 7, numpy.int64(7), numpy.uint8(7), torch.tensor(7), 2**63 - 1]
    assert [steps.whole(step) for step in taken] == [0, 7, 7, 7, 7, 2**63 - 1]
    for step in (-1, numpy.int32(-1), 2**63, 7.0, numpy.float64(7), "7", None, True, torch.tensor(7.0)):
        with pytest.raises(pillion.UsageError, match=r"step must be a whole number from 0 to \d+, not "):
            steps.whole(step)
