"""
The whole of: pods as launchers of other projects want them: the trainer of the stories under another container's name, and what they say.

Called from: the tests of tests/cluster/owners.
Must never: contain anything of Pillion but the annotations that a user writes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from support import jobs
from support.kube import Json, Kube

GRACE_S = 5
"""A trainer that ignores SIGTERM, as the first process of a container does, is killed after this and the policy's drain."""


def template(
    container: str,
    env: Mapping[str, str],
    *,
    annotations: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    **changes: Any,
) -> Json:
    """
    A pod template with the trainer.

    Args:
        container: its name, which some launchers prescribe.
        annotations: default: the opt-in to the policy `llm`.
        labels: of the pods; they are also spread over the nodes by them.
        changes: what is laid over the container.
    """
    name_and_changes = {"name": container} | changes
    pod = {"terminationGracePeriodSeconds": GRACE_S}
    *_, job = jobs.job(env=env, annotations=annotations, container=name_and_changes, pod=pod)
    found: Json = job["spec"]["template"]
    spread = found["spec"].pop("topologySpreadConstraints")
    # The launcher has a word of its own for it.
    found["spec"].pop("restartPolicy")
    if labels:
        found["metadata"]["labels"] = dict(labels)
        spread[0]["labelSelector"] = {"matchLabels": dict(labels)}
        found["spec"]["topologySpreadConstraints"] = spread
    return found


def run_ids(pods: Sequence[Json]) -> set[str]:
    """Under which ids the trainers of these pods keep their checkpoints."""
    return {
        each["value"]
        for pod in pods
        for container in pod["spec"]["containers"]
        for each in container.get("env", [])
        if each["name"] == "PILLION_RUN_ID"
    }


def are_injected(pods: Sequence[Json]) -> bool:
    """Whether all of them have the sidecar."""
    return all(pod["metadata"].get("labels", {}).get("pillion.dev/injected") == "true" for pod in pods)


def loads(kube: Kube, pods: Sequence[str], tier: str, *, container: str) -> list[Json]:
    """What the trainers of these pods have loaded last; to be polled: an assertion fails until each has, from that tier."""
    found = [line for pod in pods for line in jobs.said(kube, pod, "loaded", container=container)[-1:]]
    assert len(found) == len(pods), found
    assert {line["tier"] for line in found} == {tier}, found
    return found
