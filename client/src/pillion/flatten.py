"""
Flattens a state dict to a mapping from FQN to leaf, with the path of each leaf. Pure; no torch.

Called from: `pillion.leaves`. The names are DCP's, so that stock `dcp.load` finds them. A mapping is always a container. A list is a
container only if it holds a tensor or a mapping at any depth. An FQN is the path joined by dots.
Source: `torch.distributed.checkpoint`, flattening of nested state dicts since 2.4; a test compares with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Final

from pillion.errors import UsageError

Path = tuple[str | int, ...]

MAX_DIGITS: Final = 100
"""Maximum digits of a key that is parsed as an int. int() takes time quadratic in the length; longer keys are found by a search."""


def flatten(
    state_dict: Mapping[str, object], is_tensor: Callable[[object], bool]
) -> tuple[dict[str, object], dict[str, Path]]:
    """
    Flatten a nested state dict.

    Returns:
        FQN -> leaf, in traversal order, and FQN -> path.

    Raises:
        UsageError: two leaves have the same FQN (``{"a.b": 1, "a": {"b": 2}}``).
    """
    leaves: dict[str, object] = {}
    paths: dict[str, Path] = {}

    def visit(path: Path, value: object) -> None:
        if isinstance(value, Mapping):
            for key, child in value.items():
                visit((*path, str(key)), child)
        elif isinstance(value, list) and _holds_leaves(value, is_tensor):
            for index, child in enumerate(value):
                visit((*path, index), child)
        else:
            fqn = ".".join(map(str, path))
            if fqn in leaves:
                own = ", ".join(repr(list(keys)) for keys in _own_paths(state_dict, fqn, is_tensor))
                raise UsageError(f"two values of the state dict have the name {fqn!r}: rename one of the keys {own}")
            leaves[fqn] = value
            paths[fqn] = path

    for key, value in state_dict.items():
        visit((str(key),), value)
    return leaves, paths


def _own_paths(
    container: object, fqn: str, is_tensor: Callable[[object], bool], above: tuple[object, ...] = ()
) -> Iterator[tuple[object, ...]]:
    """Yield the paths of all leaves with the name `fqn`, with the keys of the containers themselves."""
    if isinstance(container, Mapping):
        children: Iterable[tuple[object, object]] = container.items()
    elif isinstance(container, list) and _holds_leaves(container, is_tensor):
        children = enumerate(container)
    else:
        if ".".join(map(str, above)) == fqn:
            yield above
        return
    for key, child in children:
        yield from _own_paths(child, fqn, is_tensor, (*above, key))


def _holds_leaves(values: list[object], is_tensor: Callable[[object], bool]) -> bool:
    for entry in values:
        if isinstance(entry, Mapping) or is_tensor(entry):
            return True
        if isinstance(entry, list) and _holds_leaves(entry, is_tensor):
            return True
    return False


def check_assignable(state_dict: object, paths: Iterable[Path]) -> None:
    """
    Refuse a state dict in which `assign` cannot set these paths, before any value changes.

    Raises:
        UsageError: a path leads to a read-only container. Names every such path.
    """
    refused: dict[int, str | None] = {}
    problems = []
    for path in paths:
        container = _container(state_dict, path)
        why = refused.get(id(container), "")
        if why == "":
            why = refused[id(container)] = _read_only(container, path[-1])
        if why is not None:
            problems.append(f"{'.'.join(map(str, path))!r} ({why})")
    if problems:
        raise UsageError(f"a load cannot put values into this state dict at {', '.join(problems)}: use dicts and lists")


def _read_only(container: object, key: str | int) -> str | None:
    """Return why a container is read-only. None if it is writable. A container of an unknown type is tested with its own value."""
    if type(container) in (dict, OrderedDict, list):
        return None
    try:
        if isinstance(container, list) and isinstance(key, int):
            container[key] = container[key]
        elif isinstance(container, MutableMapping):
            own = _own_key(container, key)
            container[own] = container[own]
        else:
            return f"{type(container).__name__} is not assignable"
    except Exception as err:  # the mapping is the user's own class
        why = str(err).partition("\n")[0]
        return f"{type(container).__name__} refused the assignment: {type(err).__name__}: {why}"
    return None


def assign(state_dict: object, path: Path, value: object) -> None:
    """
    Put `value` at `path` of a nested state dict, in place.

    Raises:
        UsageError: the container at the path does not support assignment (a tuple).
    """
    container = _container(state_dict, path)
    last = path[-1]
    if isinstance(container, list) and isinstance(last, int):
        container[last] = value
    elif isinstance(container, MutableMapping):
        container[_own_key(container, last)] = value
    else:
        raise UsageError(f"cannot put the loaded value at {path}: {type(container).__name__} is not assignable")


def _container(state_dict: object, path: Path) -> object:
    container = state_dict
    for key in path[:-1]:
        container = _child(container, key)
    return container


def _child(container: object, key: str | int) -> object:
    if isinstance(container, (list, tuple)) and isinstance(key, int):
        return container[key]
    if isinstance(container, Mapping):
        return container[_own_key(container, key)]
    raise UsageError(f"the state dict has no {key!r} in a {type(container).__name__}")


def _own_key(container: Mapping[object, object], key: str | int) -> object:
    """Return the mapping's own key for a key of an FQN, which is text. An optimizer's `state` has int keys."""
    if key in container:
        return key
    if isinstance(key, str) and _is_number(key) and int(key) in container:
        return int(key)  # an optimizer has thousands of them: no search
    for own in container:
        if str(own) == key:
            return own
    return key


def _is_number(text: str) -> bool:
    """Whether the text is the str() of an int."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < MAX_DIGITS and str(int(text)) == text
