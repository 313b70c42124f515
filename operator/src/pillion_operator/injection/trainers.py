"""
The whole of: choosing the trainer containers of a pod.

Called from: `decide`.
Must never: revise an earlier choice; a webhook in between may have put another container first.
"""

from typing import Final

from pillion_operator.injection import annotations, pods, status
from pillion_operator.injection.pods import Json

_DEFAULT_CONTAINER: Final = "kubectl.kubernetes.io/default-container"
_ACCELERATORS: Final = (
    *(
        "nvidia.com/",
        "amd.com/",
        "google.com/tpu",
        "aws.amazon.com/neuron",
        "habana.ai/",
        "huawei.com/",
        "gpu.intel.com/",
    ),
)
"""
Prefixes of the resource names of accelerators, and of slices of them. A pod may have other devices too, such as a network's.
"""
_FUSE: Final = "/fuse"
"""Suffix of the resource names of file system devices: a container that serves a volume does not train."""
_NOT_TRAINERS: Final = ("istio-proxy", "linkerd-proxy")
"""Sidecars of other projects that may come first among the regular containers."""


def choose(
    bare: Json, pod_annotations: annotations.PodAnnotations, earlier: status.Status | None
) -> tuple[tuple[str, ...], list[str]]:
    """The trainer containers: the annotation's, those with an accelerator, the main one, those with any device, the first; and what is wrong."""
    names = [str(each.get("name")) for each in pods.containers(bare)]
    if pod_annotations.containers:
        missing = [name for name in pod_annotations.containers if name not in names]
        allowed = f"allowed: containers of the pod: {', '.join(names)}"
        return pod_annotations.containers, [f"{annotations.CONTAINERS}: got {name!r}; {allowed}" for name in missing]
    if earlier and set(earlier.containers) <= set(names):
        return earlier.containers, []
    main, candidates = _main(bare)
    return _with_accelerators(bare) or main or _with_devices(bare) or candidates[:1], []


def is_guessed(bare: Json, pod_annotations: annotations.PodAnnotations) -> bool:
    """Whether several containers may train and the choice between them is a guess."""
    main, candidates = _main(bare)
    return not (pod_annotations.containers or main or _with_devices(bare)) and len(candidates) > 1


def _main(bare: Json) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The container that the pod calls its main one, or none; and those that may be it."""
    names = tuple(str(each.get("name")) for each in pods.containers(bare))
    candidates = tuple(name for name in names if name not in _NOT_TRAINERS) or names
    main = pods.metadata_map(bare, "annotations").get(_DEFAULT_CONTAINER, "")
    return ((main,) if main in candidates else ()), candidates


def _with_accelerators(bare: Json) -> tuple[str, ...]:
    return tuple(
        str(each["name"])
        for each in pods.containers(bare)
        if any(device.startswith(_ACCELERATORS) for device in _devices(each))
    )


def _with_devices(bare: Json) -> tuple[str, ...]:
    return tuple(str(each["name"]) for each in pods.containers(bare) if _devices(each))


def _devices(container: Json) -> list[str]:
    """
    The devices that a container requests.

    Source: Kubernetes documentation, "Extended Resources" (a name with a domain) and "Dynamic Resource Allocation" (claims).
    """
    resources = container.get("resources") or {}
    amounts = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    extended = [
        name for name, amount in amounts.items() if "/" in name and str(amount) != "0" and not name.endswith(_FUSE)
    ]
    return extended + (["claim"] if resources.get("claims") else [])
