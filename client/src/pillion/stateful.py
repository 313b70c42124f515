"""
Stateful objects: objects with a `state_dict` and a `load_state_dict` method.

Called from: `leaves` (stateful objects at the top level of a state dict), `saving` and `loading` (those below it). Pure.

As in stock DCP, only objects at the top level are saved by their state dict. An object below it is pickled whole, as any other value. A
load then calls `state_dict` of the unpickled object, and passes the result to `load_state_dict` of the user's own object.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

MAX_DEPTH: Final = 8
"""Maximum depth of nested containers that are searched. A list may contain itself."""


def is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def within(leaf: object, depth: int = MAX_DEPTH) -> Iterator[object]:
    """Yield the stateful objects of a leaf: the leaf itself, or those within its lists, tuples and dicts."""
    if type(leaf) in (list, tuple, dict):
        children: Any = leaf.values() if isinstance(leaf, dict) else leaf
        for child in children if depth else ():
            yield from within(child, depth - 1)
    elif not isinstance(leaf, type) and is_stateful(leaf):
        yield leaf


def restored(own: Any, loaded: Any, depth: int = MAX_DEPTH) -> object:
    """
    Return the loaded leaf with the user's own stateful objects in it, after they have loaded the state of the loaded ones.

    If types, lengths or keys differ, the loaded object stays.
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
