"""
The whole of: whether a JSON value has the shape of a pod, as far as the injection looks into it.

Called from: the webhook, before `decide` sees a pod. The API server's pods have it; the webhook's port can be reached by others, and a
later Kubernetes may have pods of another shape, which are then for the policy's `failurePolicy` to judge.
Must never: judge what the API server judges: fields that the injection does not read may be anything.
"""

from typing import Any, Final

MAX_DEPTH: Final = 64
"""Maximum depth of nested objects and lists. A pod has some ten levels; each level is a nested call where the pod is copied."""
_INT64: Final = 2**63
"""Limit of integers, which the API server has too. Python refuses to print an integer with 4,300 digits after an addition."""
_SCALAR: Final = (str, int, float)
_AMOUNTS: Final = {"requests": {"*": _SCALAR}, "limits": {"*": _SCALAR}}
_SECURITY: Final = {"runAsUser": int, "runAsGroup": int, "capabilities": {}, "seLinuxOptions": {}}
_CONTAINER: Final = {
    "name": str,
    "image": str,
    "imagePullPolicy": str,
    "restartPolicy": str,
    "env": [{"name": str, "value": str}],
    "envFrom": [{}],
    "volumeMounts": [{"name": str, "mountPath": str}],
    "resources": _AMOUNTS | {"claims": list},
    "securityContext": _SECURITY,
}
_POD: Final[dict[str, Any]] = {
    "metadata": {
        "name": str,
        "generateName": str,
        "labels": {"*": str},
        "annotations": {"*": str},
        "ownerReferences": [{"apiVersion": str, "kind": str, "name": str, "uid": str}],
    },
    "spec": {
        "containers": [_CONTAINER],
        "initContainers": [_CONTAINER],
        "volumes": [{"name": str}],
        "terminationGracePeriodSeconds": int,
        "os": {"name": str},
        "nodeSelector": {"*": str},
        "dnsPolicy": str,
        "resources": _AMOUNTS,
        "securityContext": _SECURITY,
    },
}
"""Type of each field: a type, an object of types, or a list of one type. `*` is every field."""

_STATUS: Final[dict[str, Any]] = {
    **dict.fromkeys(("policy", "policy_uid", "job_kind", "job_name", "job_id", "image"), str),
    "policy_generation": int,
    "containers": [str],
    "warnings": [str],
    "before": {
        "grace_s": int,
        "grace_set_s": int,
        "resources": _AMOUNTS,
        "resources_set": _AMOUNTS,
        "python_path": {"*": str},
        "declared": _CONTAINER,
    },
}
"""Types in the annotation that records the injection: everyone who creates a pod can write it."""


class NotAPod(ValueError):
    """A value is not shaped like a pod; the text names the place."""


def require(pod: Any) -> None:
    """
    Raises:
        NotAPod: see `problem`.
    """
    if text := problem(pod):
        raise NotAPod(text)


def problem(pod: Any, parts: tuple[str, ...] = ("metadata", "spec")) -> str:
    """Describe the first field of unexpected type in a pod, or in some parts of it; empty string if there is none."""
    if not isinstance(pod, dict) or not all(isinstance(pod.get(part), dict) for part in parts):
        return "it has no " + " and ".join(parts)
    if _is_deeper(pod, MAX_DEPTH):
        return f"it is nested more than {MAX_DEPTH} deep"
    return _problem({part: pod[part] for part in parts}, _POD, "")


def status_problem(document: Any) -> str:
    """Describe the first field of unexpected type in a status annotation; empty string if there is none."""
    return "it is nested too deep" if _is_deeper(document, MAX_DEPTH) else _problem(document, _STATUS, "")


def _problem(value: Any, shape: Any, path: str) -> str:
    at = path.lstrip(".") or "it"
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{at} must be an object"
        inner = ((key, shape.get(key, shape.get("*"))) for key in value)
        if shape is _CONTAINER and not isinstance(value.get("name"), str):
            return f"{at} has no name"
        # A null is an absent field.
        problems = (
            _problem(value[key], expected, f"{path}.{key}")
            for key, expected in inner
            if expected is not None and value[key] is not None
        )
        return next(filter(None, problems), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} must be a list"
        problems = (_problem(each, shape[0], f"{path}[{index}]") for index, each in enumerate(value))
        return next(filter(None, problems), "")
    if not isinstance(value, shape) or isinstance(value, bool):
        return f"{at} is of another type"
    return f"{at} is no number of 64 bits" if isinstance(value, int) and not -_INT64 <= value < _INT64 else ""


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
