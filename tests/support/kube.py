"""
The whole of: talking to a cluster as a user does: kubectl, with JSON in and out.

Called from: the tests of the level cluster, the cluster's demo.
Must never: wait without a deadline, or hide what kubectl said.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from support.deadlines import Deadline, eventually

Json = dict[str, Any]
T = TypeVar("T")

OPERATOR: Final = "pillion.dev/operator"
"""Who Pillion's events are from: `pillion_operator.cluster.events.CONTROLLER`."""


class KubectlFailed(AssertionError):
    """kubectl refused; the text is what it said. An assertion, so that `eventually` tries again."""


@dataclass(frozen=True, slots=True)
class Kube:
    """kubectl with a kubeconfig, in a namespace."""

    kubectl: Path
    kubeconfig: Path
    namespace: str

    def run(self, *arguments: str, given: str | None = None, deadline: Deadline = Deadline.API) -> str:
        """
        Run kubectl; its standard output.

        Raises:
            KubectlFailed: it refused, or did not end in time.
        """
        command = [str(self.kubectl), f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *arguments]
        try:
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, check=False, timeout=deadline.s + 5
            )
        except subprocess.TimeoutExpired as err:
            raise KubectlFailed(f"kubectl {' '.join(arguments)}: not done within {deadline.s} s") from err
        if done.returncode:
            raise KubectlFailed(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *documents: Json) -> None:
        """Apply objects."""
        self.run("apply", "-f", "-", given=_list(documents))

    def create(self, *documents: Json) -> None:
        """Create objects."""
        self.run("create", "-f", "-", given=_list(documents))

    def warned(self, document: Json) -> str:
        """Return kubectl's standard error for the creation of an object, without creating it."""
        command = [str(self.kubectl), f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}"]
        asked = [*command, "create", "--dry-run=server", "-f", "-"]
        done = subprocess.run(
            asked, input=json.dumps(document), capture_output=True, text=True, check=False, timeout=Deadline.API.s + 5
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    def get(self, kind: str, name: str) -> Json | None:
        """An object, or None where there is none."""
        text = self.run("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def all(self, kind: str, selector: str = "") -> list[Json]:
        """The objects of a kind."""
        options = ["-l", selector] if selector else []
        items: list[Json] = json.loads(self.run("get", kind, "-o", "json", *options))["items"]
        return items

    def delete(self, kind: str, name: str, *options: str) -> None:
        """Ask for an object to be deleted, without waiting for it."""
        self.run("delete", kind, name, "--wait=false", *options)

    def evict(self, pod: str) -> None:
        """Ask the API server for a pod's eviction, as a drain, a scheduler or a rebalancer does."""
        metadata = {"name": pod, "namespace": self.namespace}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self.run("create", "--raw", path, "-f", "-", given=json.dumps(eviction))

    def logs(self, pod: str, container: str, *options: str) -> str:
        """Return the output of a container."""
        return self.run("logs", pod, "-c", container, *options)

    def exec(self, pod: str, container: str, *command: str, deadline: Deadline = Deadline.API) -> str:
        """Run a command in a container."""
        return self.run("exec", pod, "-c", container, "--", *command, deadline=deadline)

    def annotate(self, kind: str, name: str, *pairs: str) -> None:
        """Set annotations, as key=value."""
        self.run("annotate", "--overwrite", kind, name, *pairs)

    def patch(self, kind: str, name: str, patch: Json) -> None:
        """Merge-patch an object."""
        self.run("patch", kind, name, "--type=merge", "-p", json.dumps(patch))

    def pods(self, job: str) -> list[Json]:
        """The pods of a Job that are not on their way out, by completion index."""
        found = [pod for pod in self.all("pods", f"job-name={job}") if "deletionTimestamp" not in pod["metadata"]]
        return sorted(found, key=lambda pod: pod["metadata"]["annotations"].get(_INDEX, ""))

    def pod_name(self, job: str) -> str:
        """The first pod of a Job; to be polled: an assertion fails where it has none."""
        found = self.pods(job)
        assert found, f"the Job {job} has no pod"
        return str(found[0]["metadata"]["name"])

    def newest_checkpoint(self) -> int:
        """The newest step that a Checkpoint object stands for; -1 where there is none."""
        return max((each.get("status", {}).get("step", -1) for each in self.all("checkpoints")), default=-1)

    def events(self, of: str = "") -> list[Json]:
        """Events in the namespace, of the object of that name."""
        found = self.all("events")
        return [event for event in found if not of or event["involvedObject"].get("name") == of]

    def warnings(self) -> list[str]:
        """Return Pillion's warnings in the namespace, reason and text each, without the Warnings of Kubernetes itself."""
        found = [
            each for each in self.events() if each["type"] == "Warning" and each.get("reportingComponent") == OPERATOR
        ]
        return [f"{each['reason']}: {each.get('message', '')}" for each in found]

    def until(self, predicate: Callable[[], T], deadline: Deadline, what: str) -> T:
        """`eventually`, with what the namespace holds in the message when it never comes true."""
        try:
            return eventually(predicate, deadline, what)
        except AssertionError as err:
            raise AssertionError(f"{err}\n{self.describe()}") from None

    def describe(self) -> str:
        """Return a description for people: pods, their states, events, and the ends of their logs, with longer logs of failed containers."""
        lines = []
        for command in (("get", "pods,jobs,checkpoints,checkpointpolicies", "-o", "wide"), ("get", "events")):
            try:
                lines.append(self.run(*command))
            except KubectlFailed as err:
                lines.append(str(err))
        try:
            for pod in self.all("pods"):
                for container in _containers(pod):
                    name = pod["metadata"]["name"]
                    # torchrun's own summary is longer than the end of a log, and the trainer's error stands before it.
                    tail = f"--tail={_FAILED_LINES if _exit_code(pod, container) else _LINES}"
                    try:
                        lines.append(f"--- {name} {container}\n{self.logs(name, container, tail)}")
                    except KubectlFailed as err:
                        lines.append(f"--- {name} {container}: {err}")
        except KubectlFailed as err:
            lines.append(str(err))
        return "\n".join(lines)


_INDEX = "batch.kubernetes.io/job-completion-index"
_LINES = 15
"""Maximum of log lines of a container in a description."""
_FAILED_LINES = 120
"""Maximum of log lines of a container that ended with an error, whose cause a reader looks for."""


def _list(documents: tuple[Json, ...]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)})


def _containers(pod: Json) -> list[str]:
    spec = pod["spec"]
    return [each["name"] for each in [*spec.get("initContainers", []), *spec["containers"]]]


def _exit_code(pod: Json, container: str) -> int:
    state = container_status(pod, container).get("state") or {}
    return int((state.get("terminated") or {}).get("exitCode", 0))


def undeclared(warnings: Iterable[str], declared: Iterable[str]) -> list[str]:
    """The Warnings that a story has not declared. `declared` are regular expressions for their beginnings."""
    expected = [re.compile(each) for each in declared]
    return [each for each in warnings if not any(pattern.match(each) for pattern in expected)]


def condition(document: Json | None, kind: str) -> Json:
    """A condition of an object; empty where it has none of that type."""
    conditions = ((document or {}).get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == kind), {})


def container_status(pod: Json, name: str) -> Json:
    """A container's status, init containers included; empty where there is none yet."""
    status = pod.get("status") or {}
    every = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    return next((each for each in every if each["name"] == name), {})
