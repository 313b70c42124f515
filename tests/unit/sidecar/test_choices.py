"""The pure decisions of loading and retention."""

import pytest

import pillion
from pillion.wire.policy import OnMissing, Retention
from pillion_sidecar import retention
from pillion_sidecar.executor import load


def pick(
    arena: set[int], committed: set[int], *, refused: dict[str, str] | None = None, step: int | None = None,
    fresh: bool = False, on_missing: OnMissing = OnMissing.FRESH,
) -> tuple[int, str] | None:  # fmt: skip
    return load.pick(
        arena_steps=arena,
        committed=committed,
        refused=refused or {},
        step=step,
        fresh=fresh,
        on_missing=on_missing,
        root="r",
    )


def test_the_newest_step_wins_and_the_arena_wins_a_tie() -> None:
    """Memory is faster; a newer checkpoint on storage is still newer."""
    assert pick({10, 20}, {10, 20}) == (20, "arena")
    assert pick({10}, {20}) == (20, "storage")
    assert pick({30}, {20}) == (30, "arena")


def test_what_was_refused_is_passed_over_for_the_next_best() -> None:
    """The same step may still be whole on the other tier."""
    assert pick({20}, {10, 20}, refused={"arena:20": "flip"}) == (20, "storage")
    assert pick({20}, {10, 20}, refused={"arena:20": "flip", "storage:20": "flip"}) == (10, "storage")


def test_only_refused_checkpoints_are_an_error_and_never_a_fresh_start() -> None:
    """The error carries where and why."""
    with pytest.raises(pillion.CorruptCheckpoint) as caught:
        pick(set(), {10}, refused={"storage:10": "bad digest"})
    assert caught.value.reasons == {"storage:10": "bad digest"}


def test_nothing_at_all_is_a_fresh_start_or_an_error_as_the_policy_says() -> None:
    """restore.onMissing: Fresh | Fail."""
    assert pick(set(), set()) is None
    with pytest.raises(pillion.NoCheckpoint):
        pick(set(), set(), on_missing=OnMissing.FAIL)


def test_a_step_asked_for_is_taken_or_missed_by_name() -> None:
    """Never another step than the one asked for."""
    assert pick({30}, {10, 20}, step=10) == (10, "storage")
    with pytest.raises(pillion.NoCheckpoint, match="step 15"):
        pick({30}, {10, 20}, step=15)


def test_mode_none_starts_fresh_whatever_there_is() -> None:
    """restore.mode: None."""
    assert pick({30}, {10}, fresh=True) is None


@pytest.mark.parametrize(
    ("policy", "current", "removed"),
    [
        (Retention(), 40, []),
        (Retention(keep_last=2), 40, [10, 20]),
        (Retention(keep_last=1), 40, [10, 20, 30]),
        (Retention(keep_last=1, keep_every_steps=20), 40, [10, 30]),
        (Retention(keep_last=1), 30, [10, 20]),
    ],
)
def test_retention_keeps_what_the_policy_says_and_never_the_future(
    policy: Retention, current: int, removed: list[int]
) -> None:
    """A step ahead of the one just committed belongs to somebody else, and stays."""
    assert retention.choose([10, 20, 30, 40], policy, current=current) == removed
