"""
The whole of: which checkpoint is loaded and which ones are removed: pure decisions, for any input.

Called from: pytest.
Must never: import torch; what decides runs without it.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pillion.errors import CorruptCheckpoint, NoCheckpoint
from pillion.wire.policy import Best, KeepBest, OnMissing, Retention
from pillion_sidecar.checkpoint import retention
from pillion_sidecar.executor.load import choose
from pillion_sidecar.storage import generation as generation_module

steps = st.sets(st.integers(0, 60), max_size=8)
orders = st.tuples(st.integers(0, 2), st.integers(0, 2))


orders = st.tuples(st.integers(1, 3), st.integers(0, 2))


def is_better(one: int, other: int, values: dict[int, float], mode: Best) -> bool:
    """Whether the checkpoint of a step is better than another: by its value, and where these are equal by its step."""
    if values[one] == values[other]:
        return one > other
    return values[one] < values[other] if mode is Best.MIN else values[one] > values[other]


@given(
    committed=st.dictionaries(st.integers(0, 60), orders, max_size=8),
    keep_last=st.none() | st.integers(1, 5),
    every=st.none() | st.integers(1, 9),
    keep=steps,
    values=st.none() | st.dictionaries(st.integers(0, 60), st.floats() | st.integers(0, 3).map(float), max_size=8),
    mode=st.sampled_from(list(Best)),
    count=st.integers(1, 4),
    data=st.data(),
)
def test_retention_keeps_what_it_must(
    committed: dict[int, tuple[int, int]],
    keep_last: int | None,
    every: int | None,
    keep: set[int],
    values: dict[int, float] | None,
    mode: Best,
    count: int,
    data: st.DataObject,
) -> None:
    """
    On the line: the newest keepLast, the multiples, and the best by a metric, whatever values the script gave. Everywhere: the one just committed, the one committed last, all that lie ahead
    of the one just committed, and what a load has verified. The rest goes.
    """
    current = data.draw(st.sampled_from(sorted(committed))) if committed else 5
    best = KeepBest(metric="loss", mode=mode, count=count) if values is not None and keep_last else None
    policy = Retention(keep_last=keep_last, keep_every_steps=every if keep_last else None, keep_best=best)
    removed = retention.choose(committed, policy, current=current, keep=keep, values=values or {})
    assert removed == sorted(set(removed))
    assert set(removed) <= committed.keys()
    if keep_last is None or not committed:
        assert not removed
        return
    later = {
        step: {each for each in committed if (committed[each], each) > (committed[step], step)} for step in committed
    }
    on_line = sorted(step for step in committed if step <= current and all(each > step for each in later[step]))
    must = set(on_line[-keep_last:]) | {step for step in committed if step >= current or step in keep}
    must |= {step for step in on_line if every and step % every == 0}
    must |= {step for step in committed if not later[step]}
    if best is not None and values is not None:
        judged = [step for step in on_line if step in values and values[step] == values[step]]
        must |= {step for step in judged if sum(is_better(each, step, values, mode) for each in judged) < count}
    assert committed.keys() - set(removed) == must


@given(
    arena_steps=st.dictionaries(st.integers(0, 60), orders, max_size=8),
    committed=st.dictionaries(st.integers(0, 60), orders, max_size=8),
    refused=st.sets(st.tuples(st.sampled_from(["arena", "storage"]), st.integers(0, 60)), max_size=6),
    step=st.none() | st.integers(0, 60),
    on_missing=st.sampled_from(list(OnMissing)),
)
def test_a_load_takes_the_newest_that_is_not_refused_and_starts_fresh_only_where_nothing_ever_was(
    arena_steps: dict[int, generation_module.Order],
    committed: dict[int, generation_module.Order],
    refused: set[tuple[str, int]],
    step: int | None,
    on_missing: OnMissing,
) -> None:
    """Never a refused one, never another step than asked for, the arena at a tie; an error instead of a fresh start when
    something was refused."""
    usable = {("arena", s) for s in arena_steps} | {("storage", s) for s in committed}
    usable = {(tier, s) for tier, s in usable - refused if step is None or s == step}

    def pick() -> tuple[int, str] | None:
        return choose.pick(
            memory=choose.Memory(whole=arena_steps, misfits={}),
            committed=committed,
            refused={f"{tier}:{s}": "corrupt" for tier, s in refused},
            step=step,
            fresh=False,
            on_missing=on_missing,
            root="/checkpoints",
        )

    if usable:
        found = pick()
        assert found is not None
        assert (found[1], found[0]) in usable
        order = {"arena": arena_steps, "storage": committed}
        newest = max((order[tier][s], s) for tier, s in usable)
        assert (order[found[1]][found[0]], found[0]) == newest
        assert found[1] == "arena" or ("arena", found[0]) not in usable or arena_steps[found[0]] != newest[0]
    elif refused:
        with pytest.raises(CorruptCheckpoint):
            pick()
    elif step is not None or on_missing is OnMissing.FAIL:
        with pytest.raises(NoCheckpoint):
            pick()
    else:
        assert pick() is None
