"""
The whole of: what a save keeps of the metrics and the metadata that a script gives, and what it says it does not keep.

Called from: pytest.
"""

import json
import logging
import math
from typing import Any

import numpy
import pytest
import torch

from pillion import remarking
from pillion.wire import remarks


def test_numbers_of_all_kinds_are_kept_and_come_back_bit_for_bit() -> None:
    """NumPy's, torch's, infinity and NaN, through JSON that has no name for the last two."""
    given: dict[str, Any] = {
        "a": 1,
        "b": numpy.float32(0.5),
        "c": torch.tensor([3.0]),
        "d": math.inf,
        "e": -math.inf,
        "f": math.nan,
        "g": 0.1,
    }
    kept = remarking.checked(1, given, {"tag": ["x", {"y": None}]})
    text = json.dumps(kept.to_document(), allow_nan=False)
    back = remarks.read(json.loads(text))
    assert repr(back.metrics) == repr({name: float(value) for name, value in given.items()})
    assert back.metadata == {"tag": ["x", {"y": None}]}
    assert remarks.read({}) == remarks.NO_REMARKS == remarking.checked(1, None, None)
    assert remarks.NO_REMARKS.to_document() == {}


@pytest.mark.parametrize(
    ("metrics", "metadata", "text"),
    [
        ({"loss": None}, None, "the metric 'loss': it must be a number, not None"),
        ({"loss": "1.5"}, None, "it must be a number, not '1.5'"),
        ({"loss": torch.ones(2)}, None, "the metric 'loss'"),
        ({3: 1.0}, None, "the metric 3: its name must be a printable text of 1 to 128 characters"),
        ({"": 1.0}, None, "its name must be"),
        ({"a\nb": 1.0}, None, "its name must be a printable text"),
        ([1.0], None, "a mapping of names to numbers is allowed, not a list"),
        (None, {"when": object()}, "'when' of the metadata: a mapping of names to values of JSON is allowed"),
        (None, {"big": "x" * remarks.MAX_METADATA_BYTES}, "65536 bytes are allowed"),
        (None, {"nan": math.nan}, "'nan' of the metadata"),
        (None, "text", "its metadata: a mapping of names to values of JSON is allowed, not a str"),
    ],
)
def test_what_cannot_be_kept_is_named_and_the_rest_is_kept(
    caplog: pytest.LogCaptureFixture, metrics: Any, metadata: Any, text: str
) -> None:
    """A checkpoint is worth more than what is said about it: the save goes on."""
    with caplog.at_level(logging.ERROR):
        kept = remarking.checked(7, metrics, metadata)
    assert kept == remarks.NO_REMARKS
    assert "the save of step 7 goes on without" in caplog.text
    assert text in caplog.text
    if isinstance(metrics, dict):
        assert remarking.checked(7, {"good": 2, **metrics}, {}).metrics == {"good": 2.0}


def test_damage_in_what_is_said_makes_no_checkpoint_unreadable() -> None:
    """What a later release may write as well."""
    read = remarks.read({"metrics": {"a": [1], "b": True, "c": "much", "d": 10**400, "e": 2}, "metadata": 5, "step": 1})
    assert read == remarks.Remarks(metrics={"e": 2.0})
    assert remarks.read({"metrics": "none"}) == remarks.NO_REMARKS


def test_there_is_a_bound_for_the_number_of_metrics(caplog: pytest.LogCaptureFixture) -> None:
    """The first ones stay."""
    kept = remarking.checked(1, {str(number): number for number in range(100)}, None)
    assert list(kept.metrics) == [str(number) for number in range(remarks.MAX_METRICS)]
    assert "the metric '64' and those behind it: 64 are allowed" in caplog.text
