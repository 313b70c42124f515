"""
The whole of: what a checkpoint has of what is wanted, and what it has besides.

Called from: pytest.
"""

import pytest

from pillion.errors import IncompatibleCheckpoint
from pillion.wire import layout
from pillion_sidecar.executor.load import matching, snapshot
from pillion_sidecar.executor.load.request import Wanted


def tensor(
    fqn: str, size: int = 4, dtype: str = "float32", *, start: int = 0, length: int | None = None
) -> layout.Item:
    return layout.Item(fqn, dtype, (size,), (start,), (size if length is None else length,))


WANTED = layout.Layout((tensor("model.w"), tensor("model.new")), ("step", "note"), {})
STORED = {"model.w": matching.Tensor("bfloat16", (4,)), "model.old": matching.Tensor("float32", (4,))}


def test_what_is_missing_is_an_error_that_shows_a_rename() -> None:
    """The text names what is not there and what is there instead; the field has what is wrong."""
    with pytest.raises(IncompatibleCheckpoint) as caught:
        matching.match(WANTED, STORED, {"step"}, strict=True, where="the checkpoint")
    assert set(caught.value.fqns) == {"model.new", "note"}
    assert "'model.new' is not in it" in str(caught.value)
    assert "nothing here asks for: 'model.old'" in str(caught.value)


@pytest.mark.parametrize(
    ("here", "there", "told"),
    [
        (["model._orig_mod.0.w", "model._orig_mod.1.w"], ["model.0.w", "model.1.w"], "{'model._orig_mod': 'model'}"),
        (["model.0.w", "model.1.w"], ["model._orig_mod.0.w", "model._orig_mod.1.w"], "{'model': 'model._orig_mod'}"),
        (["m.0.w", "m.1.w"], ["m.0.w", "m.1._orig_mod.w"], "{'m.1': 'm.1._orig_mod'}"),
        (["m._orig_mod.0.w", "m._orig_mod.1.w"], ["m.0._orig_mod.w", "m.1.w"], "{'m._orig_mod.0': 'm.0._orig_mod', "),
        (["m.0.w", "step"], ["m._orig_mod.0.w"], "{'m': 'm._orig_mod'}"),
        (["0.w"], ["_orig_mod.0.w"], "the module within (model._orig_mod)"),
        ([f"m.{i}.w" for i in range(99)], [f"m.{i}._orig_mod.w" for i in range(99)], "pass a function as rename"),
        (["m.0.w"], ["m.1.w"], None),
        (["m.0.w"], ["n._orig_mod.0.w"], None),
    ],
)
def test_a_name_that_differs_by_torch_compile_alone_is_told_with_its_rename(
    here: list[str], there: list[str], told: str | None
) -> None:
    """In both directions, for a model and for a layer of it; and no word of it for any other name."""
    stored = {name: matching.Tensor("float32", (4,)) for name in there}
    with pytest.raises(IncompatibleCheckpoint) as caught:
        matching.match(
            layout.Layout(tuple(map(tensor, here)), (), {}), stored, set(), strict=True, where="the checkpoint"
        )
    assert told is None or told in str(caught.value)
    assert ("torch.compile" in str(caught.value)) == (told is not None)


def test_without_strict_what_is_there_is_filled_and_the_rest_named() -> None:
    """In the dtypes that are stored. A shape or a kind that differs stays an error."""
    found = matching.match(WANTED, STORED, {"step"}, strict=False, where="the checkpoint")
    assert [(item.fqn, item.dtype) for item in found.layout.items] == [("model.w", "bfloat16")]
    assert (found.layout.opaque, found.missing, found.dtypes) == (
        ("step",),
        ("model.new", "note"),
        {"model.w": "bfloat16"},
    )
    for wrong, why in (
        ({"model.w": matching.Tensor("float32", (5,))}, "shape"),
        ({"step": STORED["model.w"]}, "tensor"),
    ):
        with pytest.raises(IncompatibleCheckpoint, match=why):
            matching.match(WANTED, wrong, set(), strict=False, where="the checkpoint")
    with pytest.raises(IncompatibleCheckpoint, match="is no tensor there"):
        matching.match(WANTED, {}, {"model.w"}, strict=False, where="the checkpoint")


def test_what_nothing_asks_for_is_named_by_the_shortest_prefix() -> None:
    """An optimizer whose state is empty asks for its groups alone."""
    stored = ["model.w", "optimizer.state.w.exp_avg", "optimizer.state.b.exp_avg", "optimizer.groups", "ema.w", "step"]
    assert matching.unexpected(stored, {"model.w", "optimizer.groups", "step"}) == ["ema", "optimizer.state"]
    assert matching.unexpected(["a"], {"a.b"}) == ["a"], "a leaf is not asked for by what would be below it"
    assert matching.unexpected(stored, stored) == []
    assert len(matching.unexpected((f"x{i}.w" for i in range(1000)), set())) == matching.MAX_UNEXPECTED


def test_pods_together_name_what_none_of_them_asks_for() -> None:
    """The stages of a pipeline ask for different layers; only what lies below a prefix of every pod is nobody's."""
    stored = ["layers.0.w", "layers.1.w", "optimizer.0.m", "optimizer.1.m", "ema.w"]
    first = matching.unexpected(stored, {"layers.0.w", "optimizer.0.m"})
    second = matching.unexpected(stored, {"layers.1.w"})
    assert first == ["ema", "layers.1", "optimizer.1"]
    assert second == ["ema", "layers.0", "optimizer"]
    assert matching.common([first, second]) == ["ema", "optimizer.1"]
    assert matching.common([first]) == first
    assert matching.common([first, []]) == []


def test_a_snapshot_fits_a_rank_by_its_own_parts() -> None:
    """More leaves, another order and other dtypes do not matter; other parts of a tensor do: they are in other ranks' memory."""
    has = layout.Layout((tensor("b"), tensor("w", 8, "bfloat16", start=4, length=4), tensor("a")), ("x", "y"), {})
    wanted = Wanted(rank=1, layout=layout.Layout((tensor("w", 8, start=4, length=4), tensor("b")), ("y",), {}))
    found = snapshot.match(wanted, has, 7, strict=True)
    assert [(item.fqn, item.dtype) for item in found.layout.items] == [("w", "bfloat16"), ("b", "float32")]
    other = Wanted(rank=1, layout=layout.Layout((tensor("w", 8, start=0, length=4),), (), {}))
    with pytest.raises(IncompatibleCheckpoint, match=r"step 7 in the memory of rank 1.*'w'"):
        snapshot.match(other, has, 7, strict=True)
