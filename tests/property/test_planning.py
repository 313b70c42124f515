"""Plans over random layouts: everything is written exactly once, by somebody who has it, and evenly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion.wire import layout
from pillion_sidecar.executor import plan as plan_module


def item(fqn: str, rows: int, offset: int, length: int) -> layout.Item:
    return layout.Item(fqn, "float32", (rows, 4), (offset, 0), (length, 4))


@st.composite
def worlds(draw: st.DrawFn) -> dict[int, layout.Layout]:
    """Ranks that share replicated tensors and each have a row shard of sharded ones; some leaves are on one rank only."""
    world = draw(st.integers(1, 5))
    items: dict[int, list[layout.Item]] = {rank: [] for rank in range(world)}
    opaque: dict[int, list[str]] = {rank: [] for rank in range(world)}
    for number in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["replicated", "sharded", "alone", "opaque"]))
        if kind == "opaque":
            for rank in draw(st.sets(st.integers(0, world - 1), min_size=1)):
                opaque[rank].append(f"o{number}")
            continue
        rows = draw(st.integers(1, 40))
        if kind == "sharded":
            share = -(-rows // world)
            for rank in range(world):
                first, last = min(rows, rank * share), min(rows, (rank + 1) * share)
                if last > first:
                    items[rank].append(item(f"t{number}", rows, first, last - first))
        else:
            holders = range(world) if kind == "replicated" else [draw(st.integers(0, world - 1))]
            for rank in holders:
                items[rank].append(item(f"t{number}", rows, 0, rows))
    return {rank: layout.Layout(tuple(items[rank]), tuple(opaque[rank]), {}) for rank in range(world)}


@given(worlds())
@settings(max_examples=200, deadline=None)
def test_every_chunk_and_every_opaque_leaf_is_written_exactly_once(layouts: dict[int, layout.Layout]) -> None:
    """By a rank that has it; replicas are not written twice, nothing is left out."""
    plan = plan_module.make_plan(layouts)
    written = [
        layouts[rank].items[index].key
        for rank, ranges in plan.items.items()
        for first, last in ranges
        for index in range(first, last)
    ]
    assert sorted(written) == sorted({each.key for of in layouts.values() for each in of.items})
    opaque = [layouts[r].opaque[i] for r, ranges in plan.opaque.items() for a, b in ranges for i in range(a, b)]
    assert sorted(opaque) == sorted({fqn for of in layouts.values() for fqn in of.opaque})


@given(worlds())
@settings(max_examples=100, deadline=None)
def test_a_plan_survives_its_document(layouts: dict[int, layout.Layout]) -> None:
    """What is published to the pods is what the coordinator planned."""
    plan = plan_module.make_plan(layouts)
    assert plan_module.Plan.from_document(plan.to_document()) == plan


@given(st.integers(2, 8), st.integers(8, 64))
@settings(max_examples=50, deadline=None)
def test_replicas_are_shared_out_evenly_and_in_one_stretch_a_rank(world: int, num_tensors: int) -> None:
    """No rank writes more than its even share and one tensor; each writes one contiguous range."""
    items = tuple(item(f"t{n}", 1024, 0, 1024) for n in range(num_tensors))
    plan = plan_module.make_plan({rank: layout.Layout(items, (), {}) for rank in range(world)})
    counts = [sum(b - a for a, b in ranges) for ranges in plan.items.values()]
    assert max(counts) - min(counts) <= 1
    assert all(len(ranges) <= 1 for ranges in plan.items.values())


def test_equal_layouts_have_equal_plan_ids_and_another_rank_changes_it() -> None:
    """The id is what makes an unchanged plan cost nothing."""
    of = layout.Layout((item("t", 4, 0, 4),), (), {})
    assert plan_module.make_plan({0: of}).plan_id == plan_module.plan_id({0: of.digest})
    assert plan_module.plan_id({0: of.digest}) != plan_module.plan_id({1: of.digest})


@pytest.mark.parametrize(
    ("layouts", "told"),
    [
        ({0: (item("t", 8, 0, 4),), 1: ()}, "a rank did not save its chunk"),
        ({0: (item("t", 8, 0, 8),), 1: (item("t", 8, 0, 4),)}, "chunks overlap"),
        ({0: (item("t", 8, 0, 8),), 1: (item("t", 9, 0, 9),)}, "on rank 0 and"),
    ],
)
def test_layouts_that_contradict_one_another_are_refused_by_name(
    layouts: dict[int, tuple[layout.Item, ...]], told: str
) -> None:
    """The error names the tensor and what is wrong with it."""
    with pytest.raises(plan_module.PlanError, match=told) as caught:
        plan_module.make_plan({rank: layout.Layout(items, (), {}) for rank, items in layouts.items()})
    assert "'t'" in str(caught.value)
    assert caught.value.ranks
