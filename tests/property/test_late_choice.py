"""
The whole of: which tensors of a save wait, against a model that looks at each byte.

Called from: pytest.
"""

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from pillion import late
from pillion.late import Place, Stretches

SMALL, MIN = 4, 20
NAMES = ["a", "b", "c", "d", "e", "f"]

stretches = st.lists(
    st.tuples(st.integers(1, 80), st.integers(0, 40)).map(lambda pair: (pair[0], sum(pair))), max_size=6
)
places = st.lists(
    st.builds(Place, fqn=st.sampled_from(NAMES), num_bytes=st.integers(0, 30), start=st.integers(0, 100)),
    max_size=6,
    unique_by=lambda place: place.fqn,
)
names = st.sets(st.sampled_from(NAMES))


@given(stretches, st.integers(0, 120), st.integers(0, 40))
def test_a_stretch_is_covered_if_each_of_its_bytes_is(owned: list[tuple[int, int]], start: int, size: int) -> None:
    """Stretches in any order, that touch and overlap, cover what the set of their bytes contains."""
    held = {byte for first, end in owned for byte in range(first, end)}
    wanted = set(range(start, start + size))
    assert Stretches(owned).covers(start, start + size) == (bool(wanted) and wanted <= held)


@given(places, stretches, names, st.none() | names)
def test_only_what_an_optimizer_holds_and_a_script_left_alone_waits(
    state: list[Place], owned: list[tuple[int, int]], changing: set[str], tried: set[str] | None
) -> None:
    """
    Each large tensor is late or early, never both. Late ones lie in an optimizer's memory with every byte, were changed by nothing else,
    and were tried unless the script asked; then all such are late. What is untried is early now and late once it was tried, if enough waits.
    """
    held = {byte for first, end in owned for byte in range(first, end)}
    with mock.patch.multiple(late, SMALL_LEAF_BYTES=SMALL, USUAL_MIN_BYTES=MIN):
        choice = late.choose(state, Stretches(owned), changing=changing, tried=tried)
        after = late.choose(state, Stretches(owned), changing=changing, tried=set(NAMES))
    large = {index for index, place in enumerate(state) if place.num_bytes > SMALL}
    allowed = {
        index
        for index in large
        if state[index].start
        and set(range(state[index].start, state[index].start + state[index].num_bytes)) <= held
        and state[index].fqn not in changing
    }
    assert set(choice.late) | set(choice.early) == large
    assert not set(choice.late) & set(choice.early)
    assert set(choice.late) <= allowed
    assert set(choice.untried) <= set(choice.early)
    if tried is None:
        assert set(choice.late) == allowed
        assert choice.untried == ()
        return
    assert {state[index].fqn for index in choice.late} <= tried
    assert not {state[index].fqn for index in choice.untried} & tried
    assert not choice.late or sum(state[index].num_bytes for index in choice.late) >= MIN
    assert set(choice.untried) <= set(after.late)
