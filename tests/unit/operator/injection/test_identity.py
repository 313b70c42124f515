"""
The whole of: which training a pod belongs to: for each launcher what its id is, and which pods are refused.

Called from: pytest. The table in docs/reference/annotations.md is compared with the launchers here.
Must never: compare whole messages.
"""

import re
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion_operator.injection import annotations, identity

PAGE: Final = (Path(__file__).parents[4] / "docs" / "reference" / "annotations.md").read_text()
UID: Final = "6f6d0f0e-0000-4000-8000-000000000001"


def owned(
    api: str, kind: str, name: str, labels: dict[str, str] | None = None, notes: dict[str, str] | None = None
) -> dict[str, Any]:
    owner = {"apiVersion": api, "kind": kind, "name": name, "uid": UID, "controller": True}
    return {"metadata": {"labels": labels or {}, "ownerReferences": [owner], "annotations": notes or {}}, "spec": {}}


JOBSET: Final = {"jobset.sigs.k8s.io/jobset-name": "s", "jobset.sigs.k8s.io/jobset-uid": "set"}
TRAINJOB: Final = JOBSET | {"trainer.kubeflow.org/trainjob-name": "s"}
LWS: Final = {"leaderworkerset.sigs.k8s.io/name": "l", "leaderworkerset.sigs.k8s.io/group-index": "1"}
RAYJOB: Final = {"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": "r"}
GANG: Final = {"kueue.x-k8s.io/pod-group-name": "g"}


@pytest.mark.parametrize(
    ("pod", "expected"),
    [
        (owned("batch/v1", "Job", "a", {"job-name": "a"}), ("Job", "a", "a", UID)),
        (owned("batch/v1", "Job", "s-n-0", JOBSET), ("JobSet", "s", "s", "set")),
        (owned("batch/v1", "Job", "s-n-0", TRAINJOB), ("TrainJob", "s", "s", "")),
        (owned("batch/v1", "Job", "m-launcher", {"training.kubeflow.org/job-name": "m"}), ("MPIJob", "m", "m", "")),
        (owned("kubeflow.org/v2beta1", "MPIJob", "m"), ("MPIJob", "m", "m", UID)),
        (owned("kubeflow.org/v1", "PyTorchJob", "p"), ("PyTorchJob", "p", "p", UID)),
        (owned("apps/v1", "StatefulSet", "l-1", LWS), ("LeaderWorkerSet", "l", "l-1", "")),
        (owned("batch.volcano.sh/v1alpha1", "Job", "v"), ("VolcanoJob", "v", "v", UID)),
        (owned("ray.io/v1", "RayCluster", "r-raycluster-7zk9m", RAYJOB), ("RayJob", "r", "r", "")),
        (owned("apps/v1", "ReplicaSet", "d-5f7c", {"pod-template-hash": "5f7c"}), ("Deployment", "d", "d", "")),
        (owned("apps/v1", "StatefulSet", "x"), ("StatefulSet", "x", "x", UID)),
        (owned("example.com/v1", "Launcher", "x", GANG), ("PodGroup", "g", "g", "")),
        ({"metadata": {"generateName": "g-", "labels": GANG}}, ("PodGroup", "g", "g", "")),
        ({"metadata": {"name": "alone"}}, ("Pod", "alone", "alone", "")),
    ],
)
def test_a_known_owner_gives_the_id(pod: dict[str, Any], expected: tuple[str, str, str, str]) -> None:
    """Every pod of a training has the same id, after every retry, whatever stands between the user's object and the pod."""
    job = identity.identify(pod)
    assert isinstance(job, identity.Job), job.why
    assert (job.kind, job.name, job.id, job.uid) == expected
    row = next(line for line in PAGE.splitlines() if line.startswith("|") and re.search(rf"\b{expected[0]}\b", line))
    assert "refused" not in row


@pytest.mark.parametrize(
    "pod",
    [
        owned("argoproj.io/v1alpha1", "Workflow", "w"),
        owned("flyte.lyft.com/v1alpha1", "flyteworkflow", "f"),
        owned("ray.io/v1", "RayCluster", "c", {"ray.io/originated-from-crd": "RayCluster"}),
        owned("example.com/v1", "Job", "x"),
        owned("batch/v1", "Job", "sweep", notes={"batch.kubernetes.io/job-index-failure-count": "0"}),
        {"metadata": {"generateName": "exp-"}},
        {"metadata": {"name": "a-8qk2", "labels": {"dag_id": "d", "task_id": "t", "try_number": "2"}}},
        {"metadata": {"name": "a b"}},
        {},
    ],
)
def test_what_may_be_several_trainings_is_refused_with_the_remedy(pod: dict[str, Any]) -> None:
    """The text says what to write on the pod, and what it writes is enough."""
    found = identity.identify(pod)
    assert isinstance(found, identity.Unclear)
    assert annotations.JOB_ID in found.why
    assert isinstance(identity.identify(pod, "run-7"), identity.Job)


def test_labels_and_annotations_of_others_give_no_id() -> None:
    """A pod of nobody is what its name says, whatever launchers' labels its author has written on it, or another put into annotations."""
    stray = {"job-name": "a", "volcano.sh/job-name": "../../../x", **JOBSET, **LWS, **RAYJOB}
    job = identity.identify({"metadata": {"name": "alone", "labels": stray, "annotations": stray}})
    assert isinstance(job, identity.Job)
    assert job.id == "alone"


INDEX: Final = "batch.kubernetes.io/job-completion-index"


def test_the_indices_of_a_sweep_have_ids_of_their_own() -> None:
    """One template names each of its runs, and each retry of an index the same one."""
    pod = owned("batch/v1", "Job", "sweep")
    ids = set()
    for index in ("0", "1", "1"):
        pod["metadata"]["annotations"] = {INDEX: index}
        job = identity.identify(pod, "sweep-$(index)")
        assert isinstance(job, identity.Job), job.why
        assert (job.kind, job.name) == ("Job", "sweep")
        ids.add(job.id)
    assert ids == {"sweep-0", "sweep-1"}


@pytest.mark.parametrize(("made_by", "says"), [(None, INDEX), (identity.Job(kind="Job", name="s", id="s"), "template")])
def test_an_index_that_is_not_there_is_no_id(made_by: identity.Job | None, says: str) -> None:
    """A pod without an index, and a template, which has none, are refused."""
    found = identity.identify({"metadata": {"name": "a"}}, "a-$(index)", made_by=made_by)
    assert isinstance(found, identity.Unclear)
    assert says in found.why


KEYS: Final = sorted({*JOBSET, *TRAINJOB, *LWS, *RAYJOB, *GANG, INDEX, "pod-template-hash", "dag_id", "task_id"})
TEXTS: Final = st.sampled_from(["a", "0", "r-1", "..", "", "a/b", "A b", "x" * 254]) | st.text(max_size=5)
MAPS: Final = st.dictionaries(st.sampled_from(KEYS), TEXTS)
OWNERS: Final = st.sampled_from(
    [
        *(("batch/v1", "Job"), ("apps/v1", "StatefulSet"), ("apps/v1", "ReplicaSet"), ("ray.io/v1", "RayCluster")),
        *(("kubeflow.org/v1", "PyTorchJob"), ("batch.volcano.sh/v1alpha1", "Job"), ("x.io/v1", "Run"), ("", "")),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    MAPS,
    MAPS,
    st.none() | OWNERS,
    TEXTS,
    TEXTS,
    st.sampled_from(["", "a", "$(index)", "a-$(index)-$(job-index)", "$(x)"]),
)
def test_an_id_is_a_part_of_a_path_or_the_pod_is_refused(
    labels: dict[str, str],
    notes: dict[str, str],
    owner: tuple[str, str] | None,
    name: str,
    own_name: str,
    wish: str,
) -> None:
    """Whatever stands in labels, annotations and names, the id matches the one pattern; and a pod made again has the same one."""
    metadata: dict[str, Any] = {"name": own_name, "labels": labels, "annotations": notes}
    if owner:
        metadata["ownerReferences"] = [{"apiVersion": owner[0], "kind": owner[1], "name": name, "controller": True}]
    job = identity.identify({"metadata": metadata}, wish)
    if isinstance(job, identity.Unclear):
        assert annotations.JOB_ID in job.why
        return
    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?", job.id)
    if owner:
        again = identity.identify({"metadata": metadata | {"name": f"{own_name}-of-the-retry", "uid": "other"}}, wish)
        assert isinstance(again, identity.Job)
        assert again.id == job.id
