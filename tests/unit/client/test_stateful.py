"""
The whole of: objects with a state below the top level of a state dict.

Called from: pytest.
"""

import copy
import logging
from typing import Any, cast

import pytest
import torch

from pillion import leaves, loading, opaque, saving, stateful
from pillion.session import Session


class Counter:
    """Has a state."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Other(Counter):
    """Another class."""


def loaded_into(own: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Load `saved` into `own`. Returns the names that were replaced."""
    collected = leaves.Collector().collect(saved)
    archives = dict(
        zip(
            collected.layout.opaque,
            opaque.Pickler().pickled(dict(zip(collected.layout.opaque, collected.opaque, strict=True))),
            strict=True,
        )
    )
    wanted = leaves.materialize(own)
    return loading._assign(own, wanted, leaves.Collector().collect(wanted), archives)


@pytest.mark.parametrize(
    "state",
    [
        lambda x: {"a": {"b": x}}, lambda x: {"a": [x]}, lambda x: {"a": (x, 7)}, lambda x: {"a": [{"b": x}]},
        lambda x: {"a": [x, torch.ones(1)]}, lambda x: {"a": ([{"b": x}],)},
    ],
    ids=["mapping", "list", "tuple", "list of mappings", "list with a tensor", "tuple of lists"],
)  # fmt: skip
def test_an_object_below_the_top_level_is_given_its_state(state: Any) -> None:
    """The user's own object stays in the dict. The training would never use a new one."""
    own = Counter()
    into = state(own)
    before = copy.copy(into)
    assert loaded_into(into, state(Counter(5))) == []
    assert own.count == 5
    assert own in list(stateful.within(into["a"]))
    assert type(into["a"]) is type(before["a"])


def test_optimizers_in_a_list_are_given_their_states() -> None:
    """As the plain values beside them are put into the dict."""
    weight = torch.nn.Parameter(torch.ones(2))
    own = torch.optim.SGD([weight], lr=0.1)
    into: dict[str, Any] = {"opts": [own, 0]}
    assert loaded_into(into, {"opts": [torch.optim.SGD([weight], lr=0.5), 3]}) == []
    assert own.param_groups[0]["lr"] == 0.5
    assert own.param_groups[0]["params"][0] is weight
    assert into["opts"] == [own, 3]


@pytest.mark.parametrize("saved", [[Other(5)], [Counter(5), Counter(6)], 5], ids=["type", "length", "no list"])
def test_an_object_that_could_not_be_given_its_state_is_named(saved: Any) -> None:
    """Where the checkpoint has something else in its place, the dict has what the checkpoint has."""
    own = Counter()
    into = {"a": [own]}
    assert loaded_into(into, {"a": saved}) == ["a"]
    assert own.count == 0


def test_a_list_that_holds_itself_is_searched_all_the_same() -> None:
    """It can be pickled, so it can be saved."""
    held: list[Any] = [Counter()]
    held.append(held)
    assert len(list(stateful.within(held))) == stateful.MAX_DEPTH
    assert list(stateful.within([Counter, 1, "a", None])) == []


def test_a_save_says_once_which_objects_are_pickled_whole(caplog: pytest.LogCaptureFixture) -> None:
    """One warning for each Checkpointer, whatever it saves."""
    saver = saving.Saver(cast("Session", None), overlaps=False)
    with caplog.at_level(logging.WARNING):
        for state in ({"x": 1}, {"x": 1, "opts": [Counter()]}, {"x": 1, "a": {"b": Counter()}}):
            saver._look(leaves.Collector().collect(state))
    assert len(caplog.records) == 1
    assert "opts" in caplog.text
