"""
The objects of a job in a cluster, through the program kubectl: with the person's own context, credentials and plugins, and without a client library.

Called from: `cli.doctor`, `cli.saving`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pillion_sidecar.cli.exits import Ended, Exit, wrong_usage

KUBECTL_TIMEOUT_S: Final = 60
"""Timeout for one call of kubectl. Its own requests end before, if the API server is silent."""
INJECTED: Final = "pillion.dev/injected=true"
STATUS_ANNOTATION: Final = "pillion.dev/status"
SAVE_NOW_ANNOTATION: Final = "pillion.dev/save-now"
SIDECAR: Final = "pillion-sidecar"

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """What the API server has of one job."""

    namespace: str
    name: str
    pods: Sequence[Object]
    checkpoints: Sequence[Object]
    policies: Sequence[Object]
    events: Sequence[Object]


def parse(text: str) -> tuple[str, str]:
    """Return namespace and job of NAMESPACE/JOB. Raises: Ended."""
    namespace, slash, name = text.partition("/")
    if not slash or not namespace or not name or "/" in name:
        raise wrong_usage(f"{text!r} does not name a job: NAMESPACE/JOB is allowed, such as training/llm")
    return namespace, name


def read(namespace: str, name: str) -> Job:
    """Read the objects of a job. Raises: Ended: kubectl is missing, or the API server does not answer or refuses."""
    pods = [each for each in get(namespace, "pods", "-l", INJECTED) if job_of(each) == name]
    checkpoints = [
        each for each in get(namespace, "checkpoints.pillion.dev") if each.get("spec", {}).get("jobID") == name
    ]
    named = {str(status_of(each).get("policy", "")) for each in pods}
    policies = [each for each in get(namespace, "checkpointpolicies.pillion.dev") if each["metadata"]["name"] in named]
    own = {name, *(each["metadata"]["name"] for each in pods)}
    events = [each for each in get(namespace, "events") if each.get("involvedObject", {}).get("name") in own]
    return Job(namespace, name, pods, checkpoints, policies, events)


def get(namespace: str, *arguments: str) -> list[Object]:
    """Return a list of objects."""
    found: list[Object] = json.loads(call("get", *arguments, "-n", namespace, "-o", "json"))["items"]
    return found


def call(*arguments: str) -> str:
    """Run kubectl, and return its output. Blocks: up to KUBECTL_TIMEOUT_S. Raises: Ended."""
    program = shutil.which("kubectl")
    if program is None:
        raise Ended(Exit.UNREACHABLE, "kubectl is not in the PATH: pillion reaches a cluster through it")
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=KUBECTL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise Ended(Exit.UNREACHABLE, f"kubectl {arguments[0]} has not ended within {KUBECTL_TIMEOUT_S} s") from err
    if done.returncode != 0:
        raise Ended(Exit.UNREACHABLE, f"kubectl {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout


def status_of(pod: Object) -> Object:
    """Return what injection has written on a pod; empty: nothing that can be read. Pure."""
    try:
        found = json.loads(pod["metadata"].get("annotations", {})[STATUS_ANNOTATION])
    except (KeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def job_of(pod: Object) -> str:
    """Return the job id of an injected pod. Pure."""
    return str(status_of(pod).get("job_id", ""))
