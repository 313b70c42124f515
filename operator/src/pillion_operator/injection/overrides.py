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
    given: policy.Policy,
    pod_annotations: annotations.PodAnnotations,
    bare: Json,
    declared: Json | None,
    settings: Settings,
) -> tuple[Effective, list[str], list[str]]:
    """The policy and the image for the pod; and all problems of its annotations, and of the amounts and the image that it declares."""
    in_annotations: list[str] = []
    in_container: list[str] = []
    asked = _asked(pod_annotations, bare, declared)
    effective = given
    while asked:  # Each problem removes one of them.
        try:
            effective = policy.parse(_with(given, asked), embedded=False)
            break
        except policy.PolicyError as err:
            for problem in err.problems[: len(asked)]:
                # A request above its limit: blame the one of the two that the pod set.
                blamed = (problem.path, problem.path.replace("requests", "limits"), *asked)
                path = next(each for each in blamed if each in asked)
                _, source = asked.pop(path)
                text = f"{source}{str(problem).removeprefix(problem.path)}"
                (in_container if source.startswith(_CONTAINER) else in_annotations).append(text)
    for path, (value, source) in asked.items():
        if most := _ceiling(path, given, effective):
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
    """An image reference without its tag and digest."""
    return re.sub(r":[^/:]*$", "", image.split("@", 1)[0])


def allowed_repositories(settings: Settings) -> tuple[str, ...]:
    """The repositories from which a pod may take its sidecar's image."""
    listed = tuple(each.strip() for each in settings.allowed_images.split(",") if each.strip())
    return listed or (repository(settings.sidecar_image),)


def _asked(
    pod_annotations: annotations.PodAnnotations, bare: Json, declared: Json | None
) -> dict[str, tuple[object, str]]:
    """By path in the policy: the value that the pod requests, and its source."""
    asked: dict[str, tuple[object, str]] = {}
    for part, said in amounts.said(bare, declared).items():
        for name, amount in said.items():
            if name in ("cpu", "memory"):
                asked[f"sidecar.resources.{part}.{name}"] = (amount, f"{_CONTAINER}: resources.{part}.{name}")
    for annotation, amount in pod_annotations.resources.items():
        asked[".".join(("sidecar.resources", *annotations.RESOURCES[annotation]))] = (amount, annotation)
    if pod_annotations.staging_size_limit is not None:
        asked["staging.sizeLimit"] = (pod_annotations.staging_size_limit, annotations.STAGING_SIZE_LIMIT)
    return asked


def _with(given: policy.Policy, asked: Mapping[str, tuple[object, str]]) -> dict[str, object]:
    """The document of a policy with the pod's values in it."""
    document = policy.dump(given)
    for path, (value, _) in asked.items():
        *sections, last = path.split(".")
        into: Any = document
        for section in sections:
            into = into[section]
        into[last] = value
    return document


def container_problems(declared: Json, given: Json) -> list[str]:
    """
    What is wrong with how a pod declares the sidecar's container.

    Args:
        declared: as the API server hands it on: its plug-ins may have filled in what nobody wrote.
        given: the container as injection sets it; the same values, or less, are no problem.
    """
    problems = [
        f"{key}: injection sets it"
        for key in _DECLARED_ONLY_BY_US
        if declared.get(key) and declared[key] != given.get(key)
    ]
    if declared.get("restartPolicy", "Always") != "Always":
        problems.append(f"restartPolicy: got {declared['restartPolicy']!r}; allowed: Always, or no value")
    security: Mapping[str, Any] = declared.get("securityContext") or {}
    problems += [
        f"securityContext.{key}: injection sets it; a pod may set {', '.join(_DECLARED_SECURITY)}"
        for key, value in security.items()
        if key not in _DECLARED_SECURITY and not users.asks_for_no_more(key, value, given["securityContext"])
    ]
    for part in ("requests", "limits"):
        problems += [
            f"resources.{part}.{name}: a sidecar may only use {', '.join(_AMOUNTS)}"
            for name in (declared.get("resources") or {}).get(part) or {}
            if name not in _AMOUNTS
        ]
    return [f"{_CONTAINER}: {problem}" for problem in problems]


def _ceiling(path: str, given: policy.Policy, effective: policy.Policy) -> str:
    """The policy's maximum, where an override exceeds it; else empty."""
    # Requests need no look of their own: the policy's reader holds them below the limits.
    before, after = given.sidecar.resources.limits, effective.sidecar.resources.limits
    most, now, show = {
        "staging.sizeLimit": (given.staging.size_limit_bytes, effective.staging.size_limit_bytes, policy.format_bytes),
        "sidecar.resources.limits.memory": (before.memory_bytes, after.memory_bytes, policy.format_bytes),
        "sidecar.resources.limits.cpu": (
            before.cpu_millicores,
            after.cpu_millicores,
            quantities.format_millicores,
        ),
    }.get(path, (None, None, str))
    return show(most) if most is not None and now is not None and now > most else ""
