"""
The whole of: the warning about differences between the request and the result of a load.

Called from: pytest.
"""

import dataclasses
import logging

import pytest

from pillion import load_notes
from pillion.handle import LoadReport
from pillion.wire import layout
from pillion.wire.load_messages import Tier

REPORT = LoadReport(step=2, tier=Tier.STORAGE, path="/r/step-2", elapsed_s=0.0, size_bytes=0, refused={})
WHOLE = dataclasses.replace(
    REPORT,
    missing=("model.new",),
    unexpected=("optimizer.state", "ema"),
    narrowed={"count": "int64 -> int16"},
    replaced=("nested",),
    differing=("rng",),
    passed_over={"arena:15": "it has no 'w'"},
    set_aside=(3, 5),
    conflicting=("head.weight", "embedding.weight"),
)


def said(caplog: pytest.LogCaptureFixture, report: LoadReport, *, first: bool, alike: bool) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_notes.warn(report, empty=["optimizer.state"], first=first, alike=alike)
    assert len(caplog.records) <= 1
    return caplog.text


def test_one_warning_names_all_that_was_not_restored_as_asked(caplog: pytest.LogCaptureFixture) -> None:
    """It also names the remedy for an optimizer without a state. A load without differences logs nothing."""
    text = said(caplog, WHOLE, first=True, alike=True)
    for part in (
        "model.new", "ema", "count (int64 -> int16)", "nested", "rng", "arena:15", "it has no 'w'", "steps 3, 5", "step=5",
        "optimizer.state was empty", "head.weight, embedding.weight", "get_state_dict",
    ):  # fmt: skip
        assert part in text, part
    assert said(caplog, REPORT, first=True, alike=True) == ""


@pytest.mark.parametrize(
    ("tier", "path", "given", "line"),
    [
        (Tier.ARENA, None, False, "resumed from step 2 (memory, 0.16 s)"),
        (Tier.LOCAL, None, False, "resumed from step 2 (local disk, 0.16 s)"),
        (Tier.STORAGE, "/r/step-2", False, "resumed from step 2 (storage, 0.16 s)"),
        (Tier.STORAGE, "/r/step-2", True, "resumed from step 2 in /r/step-2 (storage, 0.16 s)"),
        (Tier.STORAGE, "/jobs/other/step-2", False, "resumed from step 2 in /jobs/other/step-2 (storage, 0.16 s)"),
        (Tier.STORAGE, "s3://bucket/r/step-2", True, "resumed from step 2 in s3://bucket/r/step-2 (storage, 0.16 s)"),
    ],
)
def test_the_line_of_a_resume_names_step_and_place(tier: Tier, path: str | None, given: bool, line: str) -> None:
    """A checkpoint of the run's own root is named by its step, and another one, also one that the policy names, by its path too."""
    report = dataclasses.replace(REPORT, tier=tier, path=path, elapsed_s=0.1649)
    assert load_notes.resumed(report, root="/r", given=given) == line


def test_what_all_ranks_would_say_is_said_by_the_first(caplog: pytest.LogCaptureFixture) -> None:
    """The others speak of their own leaves, and only where these differ from rank to rank."""
    assert said(caplog, WHOLE, first=False, alike=True) == ""
    text = said(caplog, WHOLE, first=False, alike=False)
    assert "model.new" in text
    assert "ema" not in text


@pytest.mark.parametrize(
    ("stored", "wanted", "narrows"),
    [
        ("int64", "int16", True), ("float32", "bfloat16", True), ("float32", "int64", True), ("bfloat16", "float16", True),
        ("complex64", "float32", True), ("float32", "float8_e4m3fn", True), ("float8_e5m2", "float8_e4m3fn", True),
        ("int16", "int64", False), ("bfloat16", "float32", False), ("bool", "int8", False), ("float32", "complex64", False),
        ("float8_e4m3fn", "float32", False), ("float32", "float32", False),
        ("int64", "float32", True), ("int64", "float16", True), ("int32", "bfloat16", True), ("int64", "float64", True),
        ("int64", "complex64", True), ("uint64", "int64", True), ("int8", "uint8", True), ("int64", "bool", True),
        ("float8_e8m0fnu", "float16", True), ("float32", "float8_e8m0fnu", True), ("int8", "float8_e8m0fnu", True),
        ("float8_e4m3fn", "float8_e4m3fnuz", True), ("float16", "float4_e2m1fn_x2", True), ("float64", "complex64", True),
        ("uint16", "int32", False), ("uint8", "bfloat16", False), ("int16", "float32", False), ("int32", "float64", False),
        ("uint8", "int16", False), ("float8_e5m2", "float16", False), ("float8_e8m0fnu", "float32", False),
        ("bool", "float8_e8m0fnu", False), ("int16", "complex64", False),
    ],
)  # fmt: skip
def test_a_type_that_cannot_hold_every_value_narrows(stored: str, wanted: str, *, narrows: bool) -> None:
    """70000 as int16 is 4464, and 2**24 + 1 as float32 is 2**24. A type that holds every value does not, whatever torch would promote to."""
    wanted_layout = layout.Layout((layout.Item("x", wanted, (2,), (0,), (2,)),), (), {})
    assert load_notes.narrowed({"x": stored}, wanted_layout) == ({"x": f"{stored} -> {wanted}"} if narrows else {})


def test_containers_that_hold_nothing_are_found_at_any_depth() -> None:
    """They ask for nothing, so that nothing below them is restored."""
    state = {"optimizer": {"state": {}, "groups": [{}]}, "model": {"w": 1}, "ema": {}}
    assert list(load_notes.empty_containers(state)) == ["optimizer.state", "ema"]
