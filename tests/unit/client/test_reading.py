"""
The whole of: how what was read without a state dict is cut into loads, and nested again.

Called from: pytest.
"""

import pytest

from pillion import flatten, reading
from pillion.wire import layout


def content(*names: str, opaque: tuple[str, ...] = (), length: int = 256) -> layout.Layout:
    items = tuple(layout.Item(fqn, "float32", (length,), (0,), (length,)) for fqn in names)
    return layout.Layout(items, opaque, {fqn: (fqn,) for fqn in (*names, *opaque)})


def test_a_part_has_a_bound_and_every_leaf_is_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is larger than the bound has a part of its own; the opaque leaves come last."""
    monkeypatch.setattr(reading, "PART_BYTES", 2048)
    parts = list(reading.parts(content("a", "b", "c", opaque=("n",))))
    assert [[item.fqn for item in part.items] for part in parts] == [["a", "b"], ["c"]]
    assert [part.opaque for part in parts] == [(), ("n",)]
    assert [sorted(part.paths) for part in parts] == [["a", "b"], ["c", "n"]]
    assert [len(part.items) for part in reading.parts(content("a", "b", length=4096))] == [1, 1]
    assert [part.opaque for part in reading.parts(content(opaque=("n",)))] == [("n",)]
    assert list(reading.parts(content())) == []


def test_values_are_nested_as_they_were_saved() -> None:
    """Keys are text, lists are lists, and a value that is a dict or a list itself is left as it is."""
    saved = {"a": {"b": [1.0, {"c": 2}]}, "d.e": 3, "opt": {"state": {0: {"m": 4}}}, "note": [5, 6], "t": (7,)}
    leaves, paths = flatten.flatten(saved, lambda value: isinstance(value, float))
    assert reading.nested(paths, leaves) == saved | {"opt": {"state": {"0": {"m": 4}}}}
    assert reading.nested({"x": ("x",)}, {"x": {0: "zero"}}) == {"x": {0: "zero"}}, "a value, not a list"


def test_a_part_of_a_list_is_a_dict_by_index_and_a_value_in_the_way_of_others_keeps_its_name() -> None:
    """A list with a hole would move what is behind it. Ranks may disagree whether a name is a value or has values below it."""
    assert reading.nested({"l.2": ("l", 2)}, {"l.2": "two"}) == {"l": {2: "two"}}
    paths: dict[str, flatten.Path] = {"a": ("a",), "a.b": ("a", "b")}
    assert reading.nested(paths, {"a": 1, "a.b": 2}) == {"a": 1, "a.b": 2}
