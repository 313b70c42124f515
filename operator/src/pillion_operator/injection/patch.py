"""
The whole of: the JSON Patch from one pod to another, by single entries, so that no list is overwritten.

Called from: `decide`. A fresh injection gives ``add`` and ``replace`` only; ``remove`` comes when something is taken out again.
Must never: put a whole list in the place of one that is there; another webhook may have written to it.
Source: RFC 6902, RFC 6901.
"""

import difflib
import json
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
    """Entries are the same entry when they have the same name, or mount path; other entries when they are equal."""
    matcher = difflib.SequenceMatcher(
        None, [_identity(e) for e in before], [_identity(e) for e in after], autojunk=False
    )
    at = 0  # The index in the list as the operations so far have made it.
    for tag, start, end, start_after, end_after in matcher.get_opcodes():
        if tag == "equal":
            for old, new in zip(before[start:end], after[start_after:end_after], strict=True):
                _values(f"{path}/{at}", old, new, operations)
                at += 1
        else:
            operations += [{"op": "remove", "path": f"{path}/{at}"} for _ in before[start:end]]
            for new in after[start_after:end_after]:
                operations.append({"op": "add", "path": f"{path}/{at}", "value": pods.copied(new)})
                at += 1


def _identity(entry: Any) -> tuple[str, str]:
    if isinstance(entry, dict):
        for key in ("mountPath", "name"):
            if isinstance(entry.get(key), str):
                return key, entry[key]
    return "value", json.dumps(entry, sort_keys=True)


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
