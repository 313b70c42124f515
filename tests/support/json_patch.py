"""
The whole of: applying a JSON Patch (RFC 6902), as far as injection writes one.

Called from: the injection's tests, which apply each patch to the pod that it was made for, as the API server does.
Must never: change what it is given, or accept an operation that the RFC calls an error.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any


def apply(document: Any, operations: Iterable[Mapping[str, Any]]) -> Any:
    """
    The document after the operations add, replace, remove and test.

    Raises:
        KeyError, IndexError, ValueError: the operation has no target, or a test fails.
    """
    result = copy.deepcopy(document)
    for operation in operations:
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        target = result
        for part in path:
            target = target[int(part)] if isinstance(target, list) else target[part]
        key: Any = int(last) if isinstance(target, list) else last
        if operation["op"] in ("remove", "replace"):
            del target[key]
        if operation["op"] in ("add", "replace"):
            if not isinstance(target, list):
                target[key] = copy.deepcopy(operation["value"])
            elif not 0 <= key <= len(target):
                raise IndexError(operation["path"])
            else:
                target.insert(key, copy.deepcopy(operation["value"]))
        elif operation["op"] == "test" and target[key] == operation["value"]:
            continue
        elif operation["op"] != "remove":
            raise ValueError(operation["op"])
    return result
