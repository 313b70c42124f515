"""The pure decisions of loading and retention."""

from typing import Final

import pytest

import pillion
from pillion.wire.policy import OnMissing, Retention
from pillion_sidecar import catalog, retention
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
    committed = dict.fromkeys([10, 20, 30, 40], (1, 0))
    assert retention.choose(committed, policy, current=current) == removed


ROLLED_BACK: Final = {100: (1, 0), 200: (1, 0), 300: (1, 0), 150: (1, 1)}
"""Training went back from 300 to 100, and has saved 150 since."""


def test_the_line_is_what_led_to_the_checkpoint_that_was_committed_last() -> None:
    """Steps that training went back behind are off it, in this session or one before."""
    assert retention.line(ROLLED_BACK) == [100, 150]
    assert retention.line({**ROLLED_BACK, 50: (2, 0)}) == [50]
    assert retention.line({10: (1, 0), 20: (2, 0), 30: (2, 1)}) == [10, 20, 30]
    assert retention.line({}) == []


@pytest.mark.parametrize(
    ("later", "keep", "removed"),
    [
        ({}, [], []),
        ({250: (1, 1)}, [], [100, 200]),
        ({250: (1, 1)}, [100], [200]),
        ({310: (1, 1), 320: (1, 1)}, [], [100, 150, 200, 300]),
    ],
)
def test_what_a_rollback_left_stays_until_training_has_passed_it_and_never_counts(
    later: dict[int, tuple[int, int]], keep: list[int], removed: list[int]
) -> None:
    """keepLast: 2 counts the checkpoints that led to the newest; one that a load has verified stays besides."""
    committed = {**ROLLED_BACK, **later}
    current = max(later, default=150)
    assert retention.choose(committed, Retention(keep_last=2), current=current, keep=keep) == removed


def test_what_another_program_wrote_is_as_old_as_the_newest_of_ours_below_it() -> None:
    """It has no generation: a larger step is newer, unless Pillion has gone back behind it."""
    assert catalog.ordered({1: None, 5: (2, 0), 7: None, 9: (1, 0)}) == {1: (0, 0), 5: (2, 0), 7: (2, 0), 9: (1, 0)}
