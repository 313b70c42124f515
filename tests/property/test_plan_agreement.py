"""
The whole of: what pods make of a plan: the same plan whoever asks, files in which nothing overlaps, one `.metadata` that all agree on.

Called from: pytest. `test_planning.py` has what holds of a plan alone.
Must never: place anything by the rule under test; only compare what two sides say.
"""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from pillion.wire import layout
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.executor import plan as plan_module
from pillion_sidecar.executor.save.write import RankPlacement
from pillion_sidecar.storage import stretches

BEST_TIMES: int = 2
"""No rank writes more than so many times what the best plan would have its busiest rank write."""
Held = dict[layout.Item, frozenset[int]]


def item(number: int, rows: int, first: int, length: int) -> layout.Item:
    return layout.Item(f"t{number}", "float32", (rows, 4), (first, 0), (length, 4))


@st.composite
def worlds(draw: st.DrawFn) -> dict[int, layout.Layout]:
    """Chunks that any set of ranks may hold, in any order on each of them, and opaque leaves of some."""
    world = draw(st.integers(1, 5))
    ranks = st.sets(st.integers(0, world - 1), min_size=1)
    items: dict[int, list[layout.Item]] = {rank: [] for rank in range(world)}
    opaque: dict[int, list[str]] = {rank: [] for rank in range(world)}
    for number in range(draw(st.integers(0, 10))):
        rows = draw(st.sampled_from((1, 3, 40, 400, 2000)))
        cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=2))})
        for first, last in itertools.pairwise(cuts):
            for rank in draw(ranks):
                items[rank].append(item(number, rows, first, last - first))
    for number in range(draw(st.integers(0, 3))):
        for rank in draw(ranks):
            opaque[rank].append(f"o{number}")
    shuffle = random.Random(draw(st.integers(0, 2**16)))
    for rank in range(world):
        shuffle.shuffle(items[rank])
        shuffle.shuffle(opaque[rank])
    return {rank: layout.Layout(tuple(items[rank]), tuple(opaque[rank]), {}) for rank in range(world)}


def holders(layouts: dict[int, layout.Layout]) -> Held:
    """By chunk: the ranks that have it."""
    found: dict[layout.Item, set[int]] = {}
    for rank, of in layouts.items():
        for each in of.items:
            found.setdefault(each, set()).add(rank)
    return {each: frozenset(ranks) for each, ranks in found.items()}


def written_bytes(each: layout.Item) -> int:
    return each.payload_bytes + layout.HEAD_BYTES


def best_share(held: Held, world: int) -> float:
    """What the busiest rank writes at least, whatever the plan: the largest chunk, or what some ranks alone hold, shared among them."""
    groups = (set(group) for size in range(1, world + 1) for group in itertools.combinations(range(world), size))
    alone = (
        sum(written_bytes(each) for each, ranks in held.items() if ranks <= group) / len(group) for group in groups
    )
    return max(max(alone), max(map(written_bytes, held), default=0))


@given(layouts=worlds(), order=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_plan_is_the_same_whoever_reported_first(layouts: dict[int, layout.Layout], order: random.Random) -> None:
    """Documents arrive in any order; plan and id do not depend on it."""
    ranks = list(layouts)
    order.shuffle(ranks)
    assert plan_module.make_plan({rank: layouts[rank] for rank in ranks}) == plan_module.make_plan(layouts)
    assert plan_module.plan_id({rank: layouts[rank].digest for rank in ranks}) == plan_module.make_plan(layouts).plan_id


@given(layouts=worlds())
@settings(max_examples=200, deadline=None)
def test_no_rank_writes_more_than_twice_what_the_best_plan_gives_its_busiest(layouts: dict[int, layout.Layout]) -> None:
    """Whatever sets of ranks hold the chunks, and however unequal these are."""
    plan = plan_module.make_plan(layouts)
    held = holders(layouts)
    for rank, ranges in plan.items.items():
        taken = [layouts[rank].items[index] for first, last in ranges for index in range(first, last)]
        assert all(rank in held[each] for each in taken), "writes what it does not hold"
        assert sum(map(written_bytes, taken)) <= BEST_TIMES * best_share(held, len(layouts))


@given(layouts=worlds(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_files_hold_every_chunk_once_where_metadata_says(
    layouts: dict[int, layout.Layout], data: st.DataObject
) -> None:
    """
    Each pod places its own ranks, the coordinator all of them: chunk for chunk the same place. In a file nothing overlaps, and all of it
    lies within the file's length; a file system gets one file of whole pages a rank, a bucket files of exactly their items, each cut at the
    agreed size unless one item alone is larger.
    """
    plan = plan_module.make_plan(layouts)
    lengths = {
        rank: tuple(data.draw(st.lists(st.integers(0, 9000), min_size=len(of.opaque), max_size=len(of.opaque))))
        for rank, of in layouts.items()
    }
    object_bytes = data.draw(st.none() | st.integers(1, 20_000), "object_bytes")
    received = plan_module.Plan.from_document(plan.to_document())
    chunks, opaque = [], []
    for rank, of in layouts.items():
        ours = RankPlacement(rank, of, lengths[rank], received, "7", object_bytes)
        theirs = RankPlacement(rank, layout.decode(of.encoded), lengths[rank], plan, "7", object_bytes)
        assert ours.chunks() == theirs.chunks()
        assert ours.opaque() == theirs.opaque()
        assert ours.files == theirs.files
        placed = [each for _, each in ours.chunks()] + [each for _, each in ours.opaque()]
        assert {each.file for each in placed} == set(ours.files)
        for name, file in ours.files.items():
            within = [(each.offset, each.length) for each in placed if each.file == name]
            spans = sorted((offset, offset + length) for offset, length in within if length)
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "two things overlap"
            assert all(start >= 0 and end <= file.file_bytes for start, end in spans)
            if object_bytes is None:
                assert file.file_bytes % stretches.PAGE_BYTES == 0
                assert len(ours.files) == 1
            else:
                assert file.file_bytes == sum(run.length for run in file.runs)
                assert file.file_bytes <= object_bytes or len(spans) == 1
        chunks += [chunk for _, chunk in ours.chunks()]
        opaque += [leaf for _, leaf in ours.opaque()]
    held = holders(layouts)
    assert sorted((c.fqn, c.offsets, c.sizes) for c in chunks) == sorted(each.key for each in held)
    assert sorted(leaf.fqn for leaf in opaque) == sorted({fqn for of in layouts.values() for fqn in of.opaque})
    # Whoever finishes the commit from the parts makes the same bytes, in whatever order it finds them.
    assert commit.build_metadata(chunks, opaque, {}) == commit.build_metadata(chunks[::-1], opaque[::-1], {})
