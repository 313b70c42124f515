"""
The whole of: the JSON Patch from one pod to another, by single entries, so that no list is overwritten.

Called from: `decide`. A fresh injection gives ``add`` and ``replace`` only; ``remove`` comes when something is taken out again.
Must never: put a whole list in the place of one that is there; another webhook may have written to it.
Source: RFC 6902, RFC 6901.
"""

import json
from collections import Counter
from typing import Any

from pillion_operator.injection import pods
from pillion_operator.injection.pods import Json

Operation = dict[str, Any]


def diff(before: Json, after: Json) -> list[Operation]:
    """The operations, in order, that make `after` of `before`."""
    operations: list[Operation] = []
    _objects("", before, after, operations)
    return operations


def _objects(path: str, before: Json, after: Json, operations: list[Operation]) -> None:
    for key in [key for key in before if key not in after]:
        operations.append({"op": "remove", "path": f"{path}/{_escape(key)}"})
    for key, value in after.items():
        at = f"{path}/{_escape(key)}"
        if key not in before:
            operations.append({"op": "add", "path": at, "value": pods.copied(value)})
        else:
            _values(at, before[key], value, operations)


def _values(path: str, before: Any, after: Any, operations: list[Operation]) -> None:
    if isinstance(before, dict) and isinstance(after, dict):
        _objects(path, before, after, operations)
    elif isinstance(before, list) and isinstance(after, list):
        _lists(path, before, after, operations)
    elif before != after or type(before) is not type(after):
        operations.append({"op": "replace", "path": path, "value": pods.copied(after)})


def _lists(path: str, before: list[Any], after: list[Any], operations: list[Operation]) -> None:
    """
    Entries are the same entry when they have the same name, or mount path; other entries when they are equal.

    One pass: a pod may have ten thousand variables of one name, and the pods behind it wait.
    """
    old_names, new_names = [_identity(each) for each in before], [_identity(each) for each in after]
    old_left, new_left = Counter(old_names), Counter(new_names)
    old = new = at = 0  # `at` is the index in the list as the operations so far have made it.
    while old < len(before) or new < len(after):
        both = old < len(before) and new < len(after)
        if both and old_names[old] == new_names[new]:
            _values(f"{path}/{at}", before[old], after[new], operations)
            step_old = step_new = 1
        elif new == len(after) or (old < len(before) and (not new_left[old_names[old]] or old_left[new_names[new]])):
            # Gone, or come later: what stands here now has a place behind.
            operations.append({"op": "remove", "path": f"{path}/{at}"})
            step_old, step_new = 1, 0
        else:
            operations.append({"op": "add", "path": f"{path}/{at}", "value": pods.copied(after[new])})
            step_old, step_new = 0, 1
        if step_old:
            old_left[old_names[old]] -= 1
        if step_new:
            new_left[new_names[new]] -= 1
        old, new, at = old + step_old, new + step_new, at + step_new


def _identity(entry: Any) -> tuple[str, str]:
    if isinstance(entry, dict):
        for key in ("mountPath", "name"):
            if isinstance(entry.get(key), str):
                return key, entry[key]
    return "value", json.dumps(entry, sort_keys=True)


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
