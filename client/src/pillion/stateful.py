"""
The whole of: objects that say their own state (`state_dict`) and take it back (`load_state_dict`).

Called from: `leaves` (those at the top level of a state dict), `saving` and `loading` (those below it). Pure.

As in stock DCP, only those at the top level are asked for their state and saved by it. One below it is a value like any other, so it is
pickled whole; a load asks the object of the pickle for its state and gives that to the user's own object.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

DEPTH_MOST: Final = 8
"""Containers within a leaf that are searched, one in another: a list may hold itself."""


def is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def within(leaf: object, depth: int = DEPTH_MOST) -> Iterator[object]:
    """The objects with state that are a leaf, or are held by its lists, tuples and dicts."""
    if type(leaf) in (list, tuple, dict):
        children: Any = leaf.values() if isinstance(leaf, dict) else leaf
        for child in children if depth else ():
            yield from within(child, depth - 1)
    elif not isinstance(leaf, type) and is_stateful(leaf):
        yield leaf


def restored(own: Any, loaded: Any, depth: int = DEPTH_MOST) -> object:
    """
    The loaded leaf with the user's own objects in it, which have been given the state of the loaded ones.

    Where types, lengths or keys differ, the loaded object stays.
    """
    kind = type(own)
    if kind is not type(loaded) or isinstance(own, type):
        return loaded
    if kind is dict and own.keys() == loaded.keys() and depth:
        return {key: restored(own[key], value, depth - 1) for key, value in loaded.items()}
    if kind in (list, tuple) and len(own) == len(loaded) and depth:
        return kind(restored(one, other, depth - 1) for one, other in zip(own, loaded, strict=True))
    if is_stateful(own):
        own.load_state_dict(loaded.state_dict())
        return own
    return loaded
