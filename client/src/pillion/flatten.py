"""
A state dict as a flat mapping from FQN to leaf, and the path of each leaf. Pure; no torch.

Called from: `pillion.leaves`. The names are DCP's, so that stock `dcp.load` finds what we wrote: mappings are always
descended into, a list only where it holds (at any depth) a tensor or a mapping, and an FQN is the path joined by dots.
Source: `torch.distributed.checkpoint`, flattening of nested state dicts since 2.4; a test compares with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pillion.errors import UsageError

Path = tuple[str | int, ...]


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
                raise UsageError(
                    f"two values of the state dict have the name {fqn!r}: rename one of {paths[fqn]}, {path}"
                )
            leaves[fqn] = value
            paths[fqn] = path

    for key, value in state_dict.items():
        visit((str(key),), value)
    return leaves, paths


def _holds_leaves(values: list[object], is_tensor: Callable[[object], bool]) -> bool:
    for entry in values:
        if isinstance(entry, Mapping) or is_tensor(entry):
            return True
        if isinstance(entry, list) and _holds_leaves(entry, is_tensor):
            return True
    return False


def assign(state_dict: object, path: Path, value: object) -> None:
    """
    Put `value` at `path` of a nested state dict, in place.

    Raises:
        UsageError: the path leads through something that cannot be assigned to (a tuple).
    """
    container = state_dict
    for key in path[:-1]:
        container = _child(container, key)
    last = path[-1]
    if isinstance(container, list) and isinstance(last, int):
        container[last] = value
    elif isinstance(container, dict):
        container[_own_key(container, last)] = value
    else:
        raise UsageError(f"cannot put the loaded value at {path}: {type(container).__name__} is not assignable")


def _child(container: object, key: str | int) -> object:
    if isinstance(container, (list, tuple)) and isinstance(key, int):
        return container[key]
    if isinstance(container, Mapping):
        return container[_own_key(container, key)]
    raise UsageError(f"the state dict has no {key!r} in a {type(container).__name__}")


def _own_key(container: Mapping[object, object], key: str | int) -> object:
    """FQNs know keys as text only; a mapping with int keys (an optimizer's `state`) gets its own key back."""
    if key in container:
        return key
    for own in container:
        if str(own) == key:
            return own
    return key
