"""
The whole of: indexes of the injected pods and Job objects: pods under each policy, and annotation requests for each job.

Called from: the Reflectors of pods and jobs, with each change; the controller, with questions.
Must never: scan all pods to answer a question: there are thousands, and each report has questions.
"""

import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from pillion_operator.controller.commands import SaveAnnotation
from pillion_operator.home import injected
from pillion_operator.home.registry import JobKey

Json = dict[str, Any]
PolicyKey = tuple[str, str]

MAX_SAVE_ANNOTATIONS: Final = 64
"""Maximum number of annotations that are read for one job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobObject:
    """A batch/v1 Job that has the annotation."""

    namespace: str
    annotation: SaveAnnotation


def project_job(document: Json) -> JobObject | None:
    """The part of a Job that is kept: None without a request for a save."""
    value, set_at = injected.save_now(document)
    if not value:
        return None
    metadata = document["metadata"]
    namespace, name, uid = (str(metadata.get(key) or "") for key in ("namespace", "name", "uid"))
    about = {"apiVersion": "batch/v1", "kind": "Job", "namespace": namespace, "name": name, "uid": uid}
    return JobObject(
        namespace=sys.intern(namespace),
        annotation=SaveAnnotation(about=about, uid=uid, value=sys.intern(value), set_at=set_at),
    )


class PodIndex:
    """Counts and indexes over pods and jobs."""

    def __init__(self, on_policy: Callable[[PolicyKey], None], on_job: Callable[[JobKey], None]) -> None:
        """
        Args:
            on_policy: called with a policy whose number of pods changed.
            on_job: called with a job that has a new request.
        """
        self._on_policy = on_policy
        self._on_job = on_job
        self._pods: Counter[PolicyKey] = Counter()
        self._owned: Counter[tuple[str, JobKey]] = Counter()
        """Pods by the UID of their owner, and their job."""
        self._owners: dict[JobKey, set[str]] = {}
        self._on_pods: dict[JobKey, dict[str, SaveAnnotation]] = {}
        self._on_jobs: dict[str, JobObject] = {}

    def num_pods(self, key: PolicyKey) -> int:
        """Injected pods that run under a policy."""
        return self._pods[key]

    def counts(self) -> list[tuple[PolicyKey, int]]:
        """All policies that have pods, and how many."""
        return list(self._pods.items())

    def save_annotations(self, key: JobKey) -> list[SaveAnnotation]:
        """The annotations that request a save of a job: on its pods, and on the Job objects that own them."""
        on_pods = self._on_pods.get(key)
        if not on_pods and not self._on_jobs:
            return []
        on_jobs = (self._on_jobs.get(uid) for uid in self._owners.get(key, ()))
        annotated = [*(each.annotation for each in on_jobs if each), *(on_pods or {}).values()]
        return annotated[:MAX_SAVE_ANNOTATIONS]

    def jobs_with_save_annotations(self) -> list[JobKey]:
        """The jobs with a save request by annotation."""
        return list({*self._on_pods, *(key for uid, key in self._owned if uid in self._on_jobs)})

    def pod_changed(self, _: tuple[str, str], old: injected.Pod | None, new: injected.Pod | None) -> None:
        """Take a change in; called by the Reflector of pods."""
        for pod, by in ((old, -1), (new, 1)):
            if pod is not None:
                self._count(pod, by)
        policies = {(pod.namespace, pod.policy) for pod in (old, new) if pod is not None}
        if old is None or new is None or len(policies) > 1:
            for key in policies:
                self._on_policy(key)
        if new is not None and new.save_now and (old is None or old.save_now != new.save_now):
            self._on_job(JobKey(new.namespace, new.job_id))

    def job_changed(self, _: tuple[str, str], old: JobObject | None, new: JobObject | None) -> None:
        """Take a change in; called by the Reflector of jobs."""
        if old is not None:
            self._on_jobs.pop(old.annotation.uid, None)
        if new is not None:
            self._on_jobs[new.annotation.uid] = new
            for key in self._keys_of(new.annotation.uid):
                self._on_job(key)

    def _keys_of(self, owner_uid: str) -> Collection[JobKey]:
        return [key for uid, key in self._owned if uid == owner_uid]

    def _count(self, pod: injected.Pod, by: int) -> None:
        policy_key, key = (pod.namespace, pod.policy), JobKey(pod.namespace, pod.job_id)
        self._pods[policy_key] += by
        if not self._pods[policy_key]:
            del self._pods[policy_key]
        if pod.owner is not None:
            owned = (pod.owner.uid, key)
            self._owned[owned] += by
            if self._owned[owned]:
                self._owners.setdefault(key, set()).add(pod.owner.uid)
            else:
                del self._owned[owned]
                owners = self._owners[key]
                owners.discard(pod.owner.uid)
                if not owners:
                    del self._owners[key]
        save_annotations = self._on_pods.setdefault(key, {})
        if by > 0 and pod.save_now:
            save_annotations[pod.uid] = SaveAnnotation(
                about=_about(pod), uid=pod.uid, value=pod.save_now, set_at=pod.save_now_time
            )
        else:
            save_annotations.pop(pod.uid, None)
        if not save_annotations:
            del self._on_pods[key]


def _about(pod: injected.Pod) -> Json:
    return {"apiVersion": "v1", "kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid}
