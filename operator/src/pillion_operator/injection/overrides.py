"""
The whole of: what a pod may change about its sidecar, and the policy that holds for the pod afterwards.

Called from: `decide`. A pod sets it in annotations, or by declaring an init container ``pillion-sidecar`` of its own, which
injection then completes; an annotation wins. The policy is the ceiling: no limit of it is raised.
Must never: read a quantity by itself; the policy's reader does, so that both are judged alike.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pillion.wire import policy
from pillion_operator.injection import amounts, annotations, quantities, users
from pillion_operator.injection.pods import Json
from pillion_operator.settings import Settings

_CONTAINER: Final = "container pillion-sidecar"
_DECLARED_ONLY_BY_US: Final = (
    *("command", "args", "workingDir", "ports", "lifecycle"),
    *("startupProbe", "readinessProbe", "livenessProbe", "stdin", "tty"),
)
_AMOUNTS: Final = ("cpu", "memory", amounts.STORAGE)
_DECLARED_SECURITY: Final = ("runAsUser", "runAsGroup", "runAsNonRoot")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """The policy and the image for one pod."""

    policy: policy.Policy
    image: str
    image_pull_policy: str


def apply(
    base: policy.Policy,
    pod_annotations: annotations.PodAnnotations,
    bare: Json,
    declared: Json | None,
    settings: Settings,
) -> tuple[Effective, list[str], list[str]]:
    """
    Return the policy and the image for one pod, the problems of its annotations, and the problems of the container that it declares.

    `base`: the policy without the pod's overrides.
    """
    in_annotations: list[str] = []
    in_container: list[str] = []
    requested = _requested(pod_annotations, bare, declared)
    effective = base
    while requested:  # Each problem removes one value.
        try:
            effective = policy.parse(_with(base, requested), embedded=False)
            break
        except policy.PolicyError as err:
            for problem in err.problems[: len(requested)]:
                # A request above its limit: blame the one of the two that the pod set.
                blamed = (problem.path, problem.path.replace("requests", "limits"), *requested)
                path = next(each for each in blamed if each in requested)
                _, source = requested.pop(path)
                text = f"{source}{str(problem).removeprefix(problem.path)}"
                (in_container if source.startswith(_CONTAINER) else in_annotations).append(text)
    for path, (value, source) in requested.items():
        if most := _ceiling(path, base, effective):
            text = f"{source}: got {value!r}; allowed: at most {most}, the limit of the policy"
            (in_container if source.startswith(_CONTAINER) else in_annotations).append(text)

    image = pod_annotations.image or str((declared or {}).get("image") or "") or settings.sidecar_image
    if image != settings.sidecar_image and repository(image) not in allowed_repositories(settings):
        source = annotations.SIDECAR_IMAGE if pod_annotations.image else f"{_CONTAINER}: image"
        text = f"{source}: got {image!r}; allowed: an image of {', '.join(allowed_repositories(settings))}"
        (in_annotations if pod_annotations.image else in_container).append(text)
    pull = str((declared or {}).get("imagePullPolicy") or settings.image_pull_policy)
    return Effective(policy=effective, image=image, image_pull_policy=pull), in_annotations, in_container


def repository(image: str) -> str:
    """Return an image reference without tag and digest."""
    return re.sub(r":[^/:]*$", "", image.split("@", 1)[0])


def allowed_repositories(settings: Settings) -> tuple[str, ...]:
    """Return the repositories from which a pod may take its sidecar's image."""
    listed = tuple(each.strip() for each in settings.allowed_images.split(",") if each.strip())
    return listed or (repository(settings.sidecar_image),)


def _requested(
    pod_annotations: annotations.PodAnnotations, bare: Json, declared: Json | None
) -> dict[str, tuple[object, str]]:
    """Return path in the policy -> the value that the pod requests, and its source."""
    requested: dict[str, tuple[object, str]] = {}
    for part, declared_amounts in amounts.declared_amounts(bare, declared).items():
        for name, amount in declared_amounts.items():
            if name in ("cpu", "memory"):
                requested[f"sidecar.resources.{part}.{name}"] = (amount, f"{_CONTAINER}: resources.{part}.{name}")
    for annotation, amount in pod_annotations.resources.items():
        requested[".".join(("sidecar.resources", *annotations.RESOURCES[annotation]))] = (amount, annotation)
    if pod_annotations.staging_size_limit is not None:
        requested["staging.sizeLimit"] = (pod_annotations.staging_size_limit, annotations.STAGING_SIZE_LIMIT)
    return requested


def _with(base: policy.Policy, requested: Mapping[str, tuple[object, str]]) -> dict[str, object]:
    """Return the document of the base policy with the values that the pod requests."""
    document = policy.dump(base)
    for path, (value, _) in requested.items():
        *sections, last = path.split(".")
        into: Any = document
        for section in sections:
            into = into[section]
        into[last] = value
    return document


def container_problems(declared: Json, injected: Json) -> list[str]:
    """
    Return the problems of the sidecar's container as a pod declares it.

    Args:
        declared: the container in the pod. Plug-ins of the API server may have added values that its author did not write.
        injected: the container as injection sets it. The same values, or less, are no problem.
    """
    problems = [
        f"{key}: injection sets it"
        for key in _DECLARED_ONLY_BY_US
        if declared.get(key) and declared[key] != injected.get(key)
    ]
    if declared.get("restartPolicy", "Always") != "Always":
        problems.append(f"restartPolicy: got {declared['restartPolicy']!r}; allowed: Always, or no value")
    security: Mapping[str, Any] = declared.get("securityContext") or {}
    problems += [
        f"securityContext.{key}: injection sets it; a pod may set {', '.join(_DECLARED_SECURITY)}"
        for key, value in security.items()
        if key not in _DECLARED_SECURITY and not users.asks_for_no_more(key, value, injected["securityContext"])
    ]
    for part in ("requests", "limits"):
        problems += [
            f"resources.{part}.{name}: a sidecar may only use {', '.join(_AMOUNTS)}"
            for name in (declared.get("resources") or {}).get(part) or {}
            if name not in _AMOUNTS
        ]
    return [f"{_CONTAINER}: {problem}" for problem in problems]


def _ceiling(path: str, base: policy.Policy, effective: policy.Policy) -> str:
    """Return the base policy's maximum if an override exceeds it. Otherwise empty."""
    # Requests need no check, because the policy's reader keeps them below the limits.
    before, after = base.sidecar.resources.limits, effective.sidecar.resources.limits
    most, now, show = {
        "staging.sizeLimit": (base.staging.size_limit_bytes, effective.staging.size_limit_bytes, policy.format_bytes),
        "sidecar.resources.limits.memory": (before.memory_bytes, after.memory_bytes, policy.format_bytes),
        "sidecar.resources.limits.cpu": (
            before.cpu_millicores,
            after.cpu_millicores,
            quantities.format_millicores,
        ),
    }.get(path, (None, None, str))
    return show(most) if most is not None and now is not None and now > most else ""
