"""
The whole of: what the paths of a state dict lead to, and where values can be put back.

Called from: pytest.
"""

from collections import OrderedDict, UserDict
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest

from pillion import flatten
from pillion.errors import UsageError


class Frozen(dict[str, Any]):
    """A dict that takes nothing, as a configuration that was made read-only."""

    def __setitem__(self, key: str, value: object) -> None:
        raise TypeError("read-only")


class Unsearched(dict[int, float]):
    """A dict that only looks up keys."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the keys were searched")


def is_tensor(value: object) -> bool:
    return isinstance(value, bytearray)


def paths(state: dict[str, Any]) -> dict[str, flatten.Path]:
    return flatten.flatten(state, is_tensor)[1]


@pytest.mark.parametrize("container", [UserDict, OrderedDict, dict])
def test_any_mutable_mapping_takes_its_values_back(container: type) -> None:
    """A mapping of the user's own class is assigned to by item, like a dict, under its own key."""
    state: dict[str, Any] = {"cfg": container({"lr": 0.0, 3: "x"})}
    by_name = paths(state)
    flatten.check_assignable(state, by_name.values())
    flatten.assign(state, by_name["cfg.lr"], 0.1)
    flatten.assign(state, by_name["cfg.3"], "y")
    assert dict(state["cfg"]) == {"lr": 0.1, 3: "y"}


def test_what_takes_no_values_is_refused_by_name_and_unchanged() -> None:
    """Read-only mappings are all named in one error, each with the reason; a mapping below one of them is none of them."""
    state: dict[str, Any] = {
        "ok": {"a": 1},
        "proxy": MappingProxyType({"b": 2, "inner": {"c": 3}}),
        "frozen": Frozen(d=4),
    }
    with pytest.raises(UsageError) as caught:
        flatten.check_assignable(state, paths(state).values())
    assert "'proxy.b' (mappingproxy is not assignable)" in str(caught.value)
    assert "'frozen.d' (Frozen refused the assignment: TypeError: read-only)" in str(caught.value)
    assert "'ok.a'" not in str(caught.value)
    assert "'proxy.inner.c'" not in str(caught.value)
    assert state["proxy"]["b"] == 2


@pytest.mark.parametrize(
    ("state", "first", "second"),
    [
        ({"e": {"0": 1, 0: 2}}, "['e', '0']", "['e', 0]"),
        ({"a": [bytearray(1)], "a.0": 3}, "['a', 0]", "['a.0']"),
    ],
)
def test_two_values_of_one_name_are_shown_with_their_own_keys(state: dict[str, Any], first: str, second: str) -> None:
    """The error for equal names has the keys of the containers, so that one can tell them apart."""
    with pytest.raises(UsageError, match="two values") as caught:
        flatten.flatten(state, is_tensor)
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_int_keys_are_put_back_without_a_search() -> None:
    """An optimizer's state has thousands of int keys: each gets its value without a look at the others."""
    state: dict[str, Any] = {"state": Unsearched(dict.fromkeys(range(-5, 20), 0.0))}
    for key in range(-5, 20):
        flatten.assign(state, ("state", str(key)), float(key))
    assert state["state"] == {key: float(key) for key in range(-5, 20)}


@pytest.mark.parametrize("key", [1.0, True, None, (1, 2), "1", "-0", "01", 10**120, -3])
def test_a_key_of_any_kind_gets_its_own_value(key: object) -> None:
    """What str() makes of a key leads back to that key, and adds no other."""
    state: dict[str, Any] = {"state": {key: 0}}
    flatten.assign(state, paths(state)[f"state.{key}"], 7)
    assert list(state["state"].items()) == [(key, 7)]
    assert [type(own) for own in state["state"]] == [type(key)]
