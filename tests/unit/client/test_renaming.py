"""
The whole of: under which names a load asks for its values, if the checkpoint has others.

Called from: pytest.
"""

import pytest

from pillion import renaming
from pillion.errors import UsageError
from pillion.wire import layout

OWN = ["net.a.w", "net.a.b", "net.head", "ema.a.w", "step"]


def test_the_longest_entry_renames_a_value_and_all_below_it() -> None:
    """A prefix ends at a dot; what has no entry keeps its name; two values may have one name in the checkpoint."""
    there = renaming.names_there({"net": "model", "net.head": "lm_head", "ema": "model"}, OWN)
    assert there == {
        "net.a.w": "model.a.w",
        "net.a.b": "model.a.b",
        "net.head": "lm_head",
        "ema.a.w": "model.a.w",
    }
    assert renaming.names_there({"net.a.w": "w"}, OWN) == {"net.a.w": "w"}
    assert renaming.names_there(lambda fqn: fqn.removeprefix("net."), OWN)["net.head"] == "head"
    assert renaming.names_there(None, OWN) == {}


def test_an_entry_that_names_nothing_and_a_name_that_is_no_text_are_refused() -> None:
    """Both say what is allowed: the wrong direction is the usual mistake."""
    with pytest.raises(UsageError, match=r"'model'.*it maps a name of the state dict.*'net\.a\.w'"):
        renaming.names_there({"model": "net"}, OWN)
    with pytest.raises(UsageError, match="'ne'"):
        renaming.names_there({"ne": "model"}, OWN)
    with pytest.raises(UsageError, match="'step' the name None"):
        renaming.names_there({"step": None}, OWN)  # type: ignore[dict-item] # as a caller may
    with pytest.raises(UsageError, match=r"'net\.a\.w' the name ''"):
        renaming.names_there(lambda _: "", OWN)


def test_a_layout_keeps_its_places_and_names_come_back() -> None:
    """What the sidecar says of its names is said of the state dict's."""
    items = tuple(layout.Item(fqn, "float32", (2,), (0,), (2,)) for fqn in OWN[:4])
    wanted = layout.Layout(items, ("step",), {fqn: tuple(fqn.split(".")) for fqn in OWN})
    there = renaming.names_there({"net": "model", "ema": "model"}, OWN)
    asked = renaming.renamed(wanted, there)
    assert [item.fqn for item in asked.items] == ["model.a.w", "model.a.b", "model.head", "model.a.w"]
    assert asked.starts == wanted.starts
    assert renaming.own_names(["model.a.w", "step"], there, OWN) == ["net.a.w", "ema.a.w", "step"]
    assert "'net.head' as 'model.head'" in renaming.explained(there, ["model.head"])
    assert renaming.explained(there, ["step"]) == ""
    assert renaming.renamed(wanted, {}) is wanted
