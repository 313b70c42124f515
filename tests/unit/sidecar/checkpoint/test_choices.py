"""The pure decisions of loading and retention."""

from typing import Any, Final

import pytest

import pillion
from pillion.wire.policy import Best, KeepBest, OnMissing, Retention
from pillion_sidecar.checkpoint import catalog, quota, retention
from pillion_sidecar.executor.load import choose
from pillion_sidecar.storage import generation as generation_module


def pick(
    arena: set[int] | dict[int, generation_module.Order], committed: set[int] | dict[int, generation_module.Order], *,
    refused: dict[str, str] | None = None, step: int | None = None, fresh: bool = False, on_missing: OnMissing = OnMissing.FRESH,
    partial: set[int] | None = None, misfits: dict[int, str] | None = None,
) -> tuple[int, str] | None:  # fmt: skip
    """Steps given as a set are all of one session."""
    return choose.pick(
        memory=choose.Memory(
            whole=arena if isinstance(arena, dict) else dict.fromkeys(arena, (1, 0)),
            partial=partial or set(),
            misfits={each: (why, (1, 0)) for each, why in (misfits or {}).items()},
        ),
        committed=committed if isinstance(committed, dict) else dict.fromkeys(committed, (1, 0)),
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


def test_the_newest_is_the_last_one_committed_and_not_the_largest_step() -> None:
    """A rollback lasts: what was ahead of it is loaded by its number only; in memory and on storage alike."""
    assert pick(set(), {4: (1, 0), 5: (1, 0), 3: (1, 1)}) == (3, "storage")
    assert pick(set(), {4: (1, 7), 5: (1, 0), 3: (2, 0)}) == (3, "storage")
    assert pick({5: (1, 0), 3: (1, 1)}, {4: (1, 0)}) == (3, "arena")
    assert pick({5: (1, 0)}, {3: (1, 1)}) == (3, "storage")
    assert pick({5: (1, 0)}, {5: (1, 1)}) == (5, "storage"), "the same step of another branch is another checkpoint"
    assert pick({5: (1, 0)}, {3: (1, 1)}, step=5) == (5, "arena")


def test_pods_that_hold_one_step_of_two_branches_do_not_hold_it_together() -> None:
    """Mixed, it would be a state that never was."""
    offers: dict[int, dict[str, Any]] = {
        0: {"arena": {"3": {"order": [1, 1], "partial": False}, "2": {"order": [1, 0], "partial": True}}, "misfits": {}},
        2: {"arena": {"3": {"order": [1, 0], "partial": False}, "2": {"order": [1, 0], "partial": False}},
            "misfits": {"4": {"why": "it has no 'w'", "order": [1, 0]}}},
    }  # fmt: skip
    memory = choose.gathered(offers)
    assert (memory.whole, memory.partial) == ({2: (1, 0)}, {2})
    assert memory.misfits == {4: ("it has no 'w'", (1, 0))}


def test_a_snapshot_that_does_not_fit_is_passed_over_and_never_a_fresh_start() -> None:
    """It is named where it is newer than what is loaded; alone, it is an error that says what differs."""
    assert pick({10}, {5}, misfits={15: "it has no 'w'"}) == (10, "arena")
    with pytest.raises(pillion.IncompatibleCheckpoint, match="step 15: it has no 'w'"):
        pick(set(), set(), misfits={15: "it has no 'w'"})
    with pytest.raises(pillion.IncompatibleCheckpoint, match="step 15"):
        pick({10}, {5}, misfits={15: "it has no 'w'"}, step=15)
    memory = choose.Memory(whole={}, misfits={15: ("why", (1, 0)), 3: ("old", (1, 0))})
    assert choose.passed_over(memory, ((1, 0), 10)) == {"arena:15": "why"}


def test_a_snapshot_without_some_of_what_is_wanted_gives_way_to_the_same_checkpoint_on_storage() -> None:
    """Unless it is the newest: what it does not have is reported."""
    assert pick({20}, {20}, partial={20}) == (20, "storage")
    assert pick({30}, {20}, partial={30}) == (30, "arena")


def test_steps_ahead_of_the_one_that_is_loaded_are_set_aside() -> None:
    """Not those that were refused: nobody can go back to them."""
    committed = dict.fromkeys([2, 3, 4, 5], (1, 0))
    assert choose.set_aside(committed, {"storage:4": "flip"}, 2) == [3, 5]


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


@pytest.mark.parametrize(
    ("policy", "keep", "removed"),
    [
        (Retention(max_age_seconds=100), [], [10, 20]),
        (Retention(max_age_seconds=100), [10], [20]),
        (Retention(keep_last=3, max_age_seconds=40), [], [10, 20, 30]),
        (Retention(keep_last=1, keep_every_steps=10, max_age_seconds=150), [], [10, 35]),
        (Retention(max_age_seconds=1), [], [10, 20, 30]),
    ],
)
def test_an_age_removes_what_is_older_than_the_newest_by_more(
    policy: Retention, keep: list[int], removed: list[int]
) -> None:
    """Also what the other fields keep; never what must stay, and never one whose age is not known."""
    committed = dict.fromkeys([10, 20, 30, 35, 40], (1, 0))
    ages_s = {10: 200.0, 20: 101.0, 30: 50.0, 40: 0.0}
    if policy.keep_last is not None:
        ages_s[35] = 10.0
    assert retention.choose(committed, policy, current=40, keep=keep, ages_s=ages_s) == removed


@pytest.mark.parametrize(
    ("policy", "keep", "removed"),
    [
        (Retention(max_bytes=100), [], []),
        (Retention(max_bytes=99), [], [10]),
        (Retention(max_bytes=60), [], [10, 20, 30]),
        (Retention(max_bytes=60), [20], [10, 30]),
        (Retention(max_bytes=1), [], [10, 20, 30]),
        (Retention(keep_last=2, max_bytes=70), [], [10, 20]),
        (Retention(keep_last=2, max_bytes=69), [], [10, 20, 30]),
        (Retention(keep_last=3, keep_best=KeepBest(metric="loss", mode=Best.MIN, count=2), max_bytes=70), [], [20, 30]),
        (
            Retention(keep_last=3, keep_best=KeepBest(metric="loss", mode=Best.MIN, count=2), max_bytes=49),
            [],
            [10, 20, 30],
        ),
    ],
)
def test_a_quota_removes_the_oldest_first_and_the_best_last(
    policy: Retention, keep: list[int], removed: list[int]
) -> None:
    """Sizes of 10, 20, 30 and 40 bytes; the newest stays whatever its size, and what is kept counts."""
    committed = dict.fromkeys([10, 20, 30, 40], (1, 0))
    sizes, values = {step: step for step in committed}, {10: 1.0, 20: 9.0, 30: 2.0, 40: 8.0}
    assert retention.choose(committed, policy, current=40, keep=keep, values=values, sizes=sizes) == removed


def test_what_a_rollback_left_goes_before_what_led_to_the_newest() -> None:
    """Steps 200 and 300 are off the line once 310 is committed: they make room first. Those ahead stay, and count."""
    sizes = dict.fromkeys((100, 150, 200, 300, 310), 10)
    committed = {**ROLLED_BACK, 310: (1, 1)}
    assert retention.choose(committed, Retention(max_bytes=30), current=310, sizes=sizes) == [200, 300]
    assert retention.choose(ROLLED_BACK, Retention(max_bytes=20), current=150, sizes=sizes) == [100]


def test_a_quota_that_cannot_be_kept_is_said_with_what_must_stay() -> None:
    """The largest are named, with the reason that each has."""
    sizes = dict.fromkeys(range(9), 2**30) | {9: 3 * 2**30}
    assert quota.problem({8, 9}, sizes, {}, 2**32) == ""
    assert quota.problem({8, 9}, sizes, {}, None) == ""
    said = quota.problem(set(range(10)), sizes, {9: "the newest"}, 2**30)
    assert "retention.maxBytes is 1Gi, and the checkpoints that must stay have 12Gi: step 9 (3Gi, the newest), " in said
    assert said.endswith("and 5 more")


def test_what_another_program_wrote_is_as_old_as_the_newest_of_ours_below_it() -> None:
    """It has no generation: a larger step is newer, unless Pillion has gone back behind it."""
    assert catalog.ordered({1: None, 5: (2, 0), 7: None, 9: (1, 0)}) == {1: (0, 0), 5: (2, 0), 7: (2, 0), 9: (1, 0)}
