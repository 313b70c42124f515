"""
The whole of: warnings about an injected pod: settings that probably do not do what their author means.

Called from: `decide`. Each warning is a sentence of its own with the remedy in it, for the warning of an API request and for the event.
Must never: refuse anything; or warn about what cannot be known of the cluster.
"""

from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from pillion.wire import policy
from pillion_operator.injection import annotations, pods, quantities, trainers, users
from pillion_operator.injection.pods import Json
from pillion_operator.settings import Settings

MAX_GRACE_S: Final = 600
"""
Maximum grace period in seconds without a warning. Drains of nodes, preemption and retries of a job wait for it, and cluster
autoscalers allow ten minutes.
"""
MAX_ARENA_BYTES: Final = 32 * 2**40
"""Memory of the largest node that a cloud offers."""
_COMPLETION_INDEX: Final = "batch.kubernetes.io/job-completion-index"
_SIZES: Final = ("kueue.x-k8s.io/pod-group-total-count", "leaderworkerset.sigs.k8s.io/size")
"""Annotations and labels that hold the number of pods in a training."""
_SERVICES: Final = (".svc", ".svc.cluster.local")
"""Ends of the names of Services, which only the cluster's own resolver knows."""
_ONE_NODE: Final = ("ReadWriteOnce", "ReadWriteOncePod")


def find(
    bare: Json,
    done: Json,
    effective: policy.Policy,
    pod_annotations: annotations.PodAnnotations,
    declared: Json | None,
    chosen: tuple[str, ...],
    settings: Settings,
    claim_modes: tuple[str, ...],
) -> list[str]:
    """
    The doubts about one pod.

    Args:
        bare: the pod without what injection puts into it.
        done: the pod with it.
        effective: the policy that holds for it.
        pod_annotations: its annotations.
        declared: the sidecar that it declares itself, or None.
        chosen: its trainer containers.
        settings: the operator's.
        claim_modes: access modes of the claim of its storage; empty: not known.
    """
    return [
        *_about_trainers(bare, pod_annotations, chosen),
        *_about_the_user(bare, effective, declared, chosen, settings),
        *_about_the_network(bare, effective, settings),
        *_about_the_end(done),
        *_about_the_arena(bare, effective, chosen),
        *_about_the_claim(bare, effective, claim_modes),
    ]


def _about_trainers(bare: Json, pod_annotations: annotations.PodAnnotations, chosen: tuple[str, ...]) -> Iterator[str]:
    if trainers.is_guessed(bare, pod_annotations):
        names = ", ".join(str(each.get("name")) for each in pods.containers(bare))
        yield (
            f"it is unclear which of the containers {names} trains: using {', '.join(chosen)}; set {annotations.CONTAINERS}"
        )


def _about_the_user(
    bare: Json, effective: policy.Policy, declared: Json | None, chosen: tuple[str, ...], settings: Settings
) -> Iterator[str]:
    if effective.storage.object_store is not None:
        return  # Any user may send a request.
    declared_user = ((declared or {}).get("securityContext") or {}).get("runAsUser")
    if declared_user is None and effective.sidecar.run_as_user is None and users.is_unknown(bare, chosen):
        yield (
            f"the pod sets no runAsUser, so the sidecar runs as {settings.run_as_user}, which may be unable to write to a new volume: set"
            " runAsUser or fsGroup in the pod, or sidecar.runAsUser in the policy (0 where only root may write)"
        )


def _about_the_network(bare: Json, effective: policy.Policy, settings: Settings) -> Iterator[str]:
    spec = pods.spec(bare)
    if not spec.get("hostNetwork") or spec.get("dnsPolicy") not in (None, "ClusterFirst", "Default"):
        return
    store = effective.storage.object_store
    addresses = {"the controller": settings.home_url, "the object store": (store.endpoint if store else None) or ""}
    services = [name for name, url in addresses.items() if (urlsplit(url).hostname or "").endswith(_SERVICES)]
    if services:
        yield (
            f"with hostNetwork, the node's resolver does not resolve Services, so the sidecar cannot reach {' or '.join(services)}:"
            " set dnsPolicy: ClusterFirstWithHostNet"
        )


def _about_the_end(done: Json) -> Iterator[str]:
    grace_s = pods.spec(done).get("terminationGracePeriodSeconds") or 0
    if grace_s > MAX_GRACE_S:
        yield (
            f"the pod may take {grace_s} s to terminate, drain included, and a drain of its node waits that long: lower the policy's"
            " drain.timeoutSeconds or the pod's terminationGracePeriodSeconds"
        )


def _about_the_arena(bare: Json, effective: policy.Policy, chosen: tuple[str, ...]) -> Iterator[str]:
    arena_bytes = effective.staging.size_limit_bytes
    if arena_bytes is None:
        return
    size = policy.format_bytes(arena_bytes)
    if arena_bytes > MAX_ARENA_BYTES:
        yield f"no node has {size} of memory for the arena: lower staging.sizeLimit"
    elif effective.staging.memory_accounting is policy.MemoryAccounting.WORKLOAD:
        own = [quantities.num_bytes(_limit(pods.spec(bare)))]
        each = [quantities.num_bytes(_limit(one)) for one in pods.containers(bare) if one.get("name") in chosen]
        limits = own if own[0] is not None else each
        total_bytes = sum(limit for limit in limits if limit is not None)
        if None not in limits and arena_bytes >= total_bytes:
            yield (
                f"the arena of {size} is charged to the workload, whose memory limit is {policy.format_bytes(total_bytes)}: raise the trainer's"
                " memory limit, or lower staging.sizeLimit"
            )


def _limit(holder: Json) -> object:
    return ((holder.get("resources") or {}).get("limits") or {}).get("memory")


def _about_the_claim(bare: Json, effective: policy.Policy, modes: tuple[str, ...]) -> Iterator[str]:
    claim = effective.storage.persistent_volume_claim
    marks = pods.metadata_map(bare, "labels") | pods.metadata_map(bare, "annotations")
    several = marks.get(_COMPLETION_INDEX, "0") != "0" or any(marks.get(each, "1") != "1" for each in _SIZES)
    if several and claim and modes and all(each in _ONE_NODE for each in modes):
        yield (
            f"the claim {claim.claim_name} is {', '.join(modes)} and the training has several pods, which are on one node or do not start:"
            " all of them need one volume, ReadWriteMany"
        )
