"""
The whole of: requests and limits of the injected containers, given the other containers of the pod.

Called from: `sidecar_spec`, `overrides`.
Must never: leave out a request or the memory limit: a container without them is refused in a namespace with a quota; or set a limit
of local storage where the pod has none, as the kubelet takes the sum of such limits for the pod's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pillion.wire import policy
from pillion_operator.injection import pods, quantities
from pillion_operator.injection.pods import Json

FALLBACK: Final = policy.ResourceList(cpu_millicores=500, memory_bytes=2**30)
"""Amounts where neither policy nor pod sets any."""
CPU_LIMIT_MILLICORES: Final = 2000
"""
CPU limit of the sidecar where each container of the pod has one (a quota requires it) but policy and pod set none for the
sidecar. It is lower where the largest of those limits is lower, as the namespace may allow no more.
"""
DISK_BYTES: Final = 384 * 2**20
"""Local storage of the sidecar where the pod sets amounts of it: volumes on the node's disk, and container logs."""
STORAGE: Final = "ephemeral-storage"
_LIMIT_RANGER: Final = "kubernetes.io/limit-ranger"
"""Annotation in which the API server's plug-in lists the amounts that it filled in. Source: plugin/pkg/admission/limitranger."""


def declared_amounts(bare: Json, declared: Json | None) -> dict[str, dict[str, Any]]:
    """Return part -> name -> amount, as a pod declares them for its sidecar, without the defaults of a LimitRange."""
    resources = (declared or {}).get("resources") or {}
    defaults = _defaults(
        pods.metadata_map(bare, "annotations").get(_LIMIT_RANGER, ""), (declared or {}).get("name", "")
    )
    return {
        part: {name: amount for name, amount in (resources.get(part) or {}).items() if (part, name) not in defaults}
        for part in ("requests", "limits")
    }


def _defaults(text: str, container: str) -> set[tuple[str, str]]:
    # LimitRanger plugin set: cpu, memory request for container a; cpu limit for init container b
    defaults = set()
    for clause in text.partition("set:")[2].split(";"):
        match = re.fullmatch(r"\s*(.+) (request|limit) for init container (\S+)\s*", clause)
        if match and match[3] == container:
            defaults |= {(f"{match[2]}s", name.strip()) for name in match[1].split(",")}
    return defaults


def of_sidecar(
    resources: policy.Resources,
    beside: Sequence[Json],
    charged_bytes: int,
    declared: Mapping[str, Mapping[str, Any]],
    disk_bytes: int = 0,
) -> Json:
    """
    Requests and limits, both always there, with the arena in the memory.

    Args:
        resources: the policy's.
        beside: the pod's own containers and init containers.
        charged_bytes: the arena, where the sidecar pays for it.
        declared: the amounts that the pod declares for its sidecar.
        disk_bytes: the policy's local disk, where Kubernetes counts it for the pod.

    A pod of the class Guaranteed stays one: it would lose its own cores otherwise. A CPU limit is set only where each container
    of the pod has one, as it slows the drain.
    """
    requests, limits = resources.requests, resources.limits
    memory = requests.memory_bytes or limits.memory_bytes or FALLBACK.memory_bytes or 0
    memory_limit = limits.memory_bytes or memory
    cpu = requests.cpu_millicores or limits.cpu_millicores or FALLBACK.cpu_millicores or 0
    cpu_limit = limits.cpu_millicores
    if all(_is_guaranteed(each) for each in beside):
        memory, cpu_limit = memory_limit, cpu_limit or cpu
        cpu = cpu_limit
    elif cpu_limit is None and all(_amount(each, "limits", "cpu") for each in beside):
        largest = max((quantities.millicores(_amount(each, "limits", "cpu")) or 0 for each in beside), default=0)
        cpu_limit = max(cpu, min(CPU_LIMIT_MILLICORES, largest or CPU_LIMIT_MILLICORES))
    disk = _disk(beside, declared, DISK_BYTES + disk_bytes)
    return {
        "requests": _amounts(cpu, memory + charged_bytes) | disk["requests"],
        "limits": _amounts(cpu_limit, memory_limit + charged_bytes) | disk["limits"],
    }


def of_client(resources: policy.Resources, beside: Sequence[Json]) -> Json:
    """
    Those of the sidecar without the arena: what a namespace demands at least, and allows at most, holds for both.

    The container runs before the others, so that its amounts come on top of nothing.
    """
    return of_sidecar(resources, beside, 0, {})


def _disk(
    beside: Sequence[Json], declared: Mapping[str, Mapping[str, Any]], needed_bytes: int
) -> dict[str, dict[str, Any]]:
    """Local storage, by part: what the pod declares for the sidecar, else enough for it where another container sets an amount."""
    storage: dict[str, dict[str, Any]] = {"requests": {}, "limits": {}}
    for part, amounts in storage.items():
        if (own := (declared.get(part) or {}).get(STORAGE)) is not None:
            amounts[STORAGE] = own
        elif any(_amount(each, part, STORAGE) is not None for each in beside):
            amounts[STORAGE] = policy.format_bytes(needed_bytes)
    request, limit = (quantities.num_bytes(storage[part].get(STORAGE)) for part in ("requests", "limits"))
    if request and limit and request > limit:
        # The value that injection chose gives way.
        declared_part = "requests" if (declared.get("requests") or {}).get(STORAGE) is not None else "limits"
        storage["limits" if declared_part == "requests" else "requests"][STORAGE] = storage[declared_part][STORAGE]
    return storage


def _amounts(millicores: int | None, memory_bytes: int) -> dict[str, str]:
    cpu = {} if millicores is None else {"cpu": quantities.format_millicores(millicores)}
    return cpu | {"memory": policy.format_bytes(memory_bytes)}


def _amount(container: Json, part: str, name: str) -> Any:
    return ((container.get("resources") or {}).get(part) or {}).get(name)


def _is_guaranteed(container: Json) -> bool:
    """Whether a container's requests are its limits. Source: Kubernetes documentation, "Pod Quality of Service Classes"."""
    for name in ("cpu", "memory"):
        limit, request = _amount(container, "limits", name), _amount(container, "requests", name)
        if limit is None or (request is not None and not quantities.same(name, request, limit)):
            return False
    return True
