"""
Messages of any class, drawn field by field, and bodies that a stranger might send for them.

Called from: property tests. A class with a field of a new type needs nothing here as long as `wire.codec` takes the type.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from pillion.wire.message import Message

texts = st.text(max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
PLAIN: Mapping[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**53), 2**53),
    float: st.floats(allow_nan=False),
    str: texts,
    bool: st.booleans(),
    type(None): st.none(),
    Any: json_values,
}


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if origin in (types.UnionType, typing.Union):
        return st.one_of([of_type(each) for each in arguments])
    if origin is tuple and arguments[1:] == (...,):
        return st.lists(of_type(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(of_type(each) for each in arguments))
    if isinstance(hint, type) and issubclass(hint, enum.StrEnum):
        return st.sampled_from(list(hint))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return of_class(hint)
    return st.dictionaries(of_type(arguments[0]), of_type(arguments[1]), max_size=3)


def of_class(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Instances of a dataclass."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{each.name: of_type(hints[each.name]) for each in dataclasses.fields(kind)})


def bodies_for(kind: type[Message]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw a body that a stranger may send as such a message: some fields are right, some are wrong, missing or unknown."""
    hints = typing.get_type_hints(kind)
    fields = {each.name: of_type(hints[each.name]) | json_values for each in dataclasses.fields(kind)}
    known = st.fixed_dictionaries({}, optional=fields)
    return st.builds(
        lambda unknown, right: {**unknown, **right}, st.dictionaries(texts, json_values, max_size=2), known
    )
