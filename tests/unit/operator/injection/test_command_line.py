"""
The whole of: ``pillion-operator inject``, as a person or a script uses it.

Called from: pytest.
Must never: need a cluster.
"""

from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from pillion_operator import __main__

POLICY: Final = """
apiVersion: pillion.dev/v1alpha1
kind: CheckpointPolicy
metadata: {name: llm}
spec:
  trigger: {periodSteps: 10}
  staging: {sizeLimit: 1Gi}
  storage: {persistentVolumeClaim: {claimName: checkpoints}}
"""
TEMPLATE: Final[dict[str, Any]] = {
    "metadata": {"annotations": {"pillion.dev/policy": "llm"}},
    "spec": {"containers": [{"name": "trainer", "image": "example/train:1"}], "restartPolicy": "Never"},
}
WORKLOADS: Final[list[dict[str, Any]]] = [
    {"apiVersion": "batch/v1", "kind": "Job", "spec": {"template": TEMPLATE}},
    {"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"template": TEMPLATE}},
    {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": TEMPLATE}}}]},
    },
    {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "spec": {"pytorchReplicaSpecs": {"Master": {"template": TEMPLATE}, "Worker": {"template": TEMPLATE}}},
    },
    {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "spec": {"leaderWorkerTemplate": {"workerTemplate": TEMPLATE}},
    },
    {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "spec": {
            "rayClusterSpec": {"headGroupSpec": {"template": TEMPLATE}, "workerGroupSpecs": [{"template": TEMPLATE}]}
        },
    },
    {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "spec": {"tasks": [{"template": TEMPLATE}]}},
]


@pytest.fixture
def policy_file(tmp_path: Path) -> str:
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return str(path)


def write(tmp_path: Path, *documents: dict[str, Any]) -> str:
    path = tmp_path / "workload.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return str(path)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: f"{each['apiVersion'].split('.')[0]}-{each['kind']}")
def test_each_template_is_injected_under_the_id_of_its_workload(
    workload: dict[str, Any], tmp_path: Path, policy_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A workload comes out with the sidecar in every template, and `--remove` gives back what went in."""
    named = workload | {"metadata": {"name": "llama"}}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "llama"}}
    path = write(tmp_path, named, service)
    assert __main__.main(["inject", "-f", path, "-p", policy_file]) == 0
    out = capsys.readouterr().out
    num_templates = str(workload).count("'containers'")
    assert out.count("name: pillion-sidecar\n") == num_templates
    # The only group of a LeaderWorkerSet has the id that the webhook gives it.
    job_id = "llama-0" if workload["kind"] == "LeaderWorkerSet" else "llama"
    assert out.count(f"value: /pillion/storage/{job_id}\n") == 2 * num_templates
    injected = write(tmp_path, *yaml.safe_load_all(out))
    assert __main__.main(["inject", "-f", injected, "--remove"]) == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == [named, service]


def test_one_template_of_several_trainings_is_left_to_the_webhook(
    tmp_path: Path, policy_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template has no index: a sweep, and the groups of a LeaderWorkerSet, are refused with the reason."""
    sweep = TEMPLATE | {"metadata": {"annotations": {"pillion.dev/policy": "llm", "pillion.dev/job-id": "s-$(index)"}}}
    for document in (
        {"apiVersion": "batch/v1", "kind": "Job", "spec": {"template": sweep}},
        {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "spec": {"replicas": 2, "leaderWorkerTemplate": {"workerTemplate": TEMPLATE}},
        },
    ):
        path = write(tmp_path, document | {"metadata": {"name": "s"}})
        assert __main__.main(["inject", "-f", path, "-p", policy_file]) == __main__.Exit.DENIED
        said = capsys.readouterr().err
        assert "JobUnclear" in said
        assert "only the webhook can inject them" in said


def test_warnings_are_those_of_the_webhook_and_of_the_claim_beside(
    tmp_path: Path, policy_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A claim for one node that the file holds is doubted for a training of several pods."""
    gang = {"kueue.x-k8s.io/pod-group-name": "gang"}
    notes = {"pillion.dev/policy": "llm", "kueue.x-k8s.io/pod-group-total-count": "2"}
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": TEMPLATE["spec"]}
    pod["metadata"] = {"name": "gang-0", "labels": gang, "annotations": notes}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "checkpoints"}}
    for modes, doubted in ((["ReadWriteOnce"], True), (["ReadWriteOnce", "ReadWriteMany"], False)):
        path = write(tmp_path, pod, claim | {"spec": {"accessModes": modes}})
        assert __main__.main(["inject", "-f", path, "-p", policy_file]) == __main__.Exit.INJECTED
        said = capsys.readouterr().err
        assert ("the claim checkpoints is ReadWriteOnce" in said) is doubted
        assert "the pod sets no runAsUser" in said


def test_a_diff_shows_only_what_changes(tmp_path: Path, policy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines of the pod that are not changed, apart from context, are not in the diff, and none of it is taken away."""
    path = write(
        tmp_path, {"apiVersion": "v1", "kind": "Pod", **TEMPLATE, "metadata": TEMPLATE["metadata"] | {"name": "a"}}
    )
    assert __main__.main(["inject", "-f", path, "-p", policy_file, "--diff", "--image", "example/mine:2"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert any(line.startswith("+") and "image: example/mine:2" in line for line in lines)
    assert not any(line.startswith("-") for line in lines)


@pytest.mark.parametrize(
    ("annotations", "with_policy", "expected", "reason"),
    [
        ({}, True, __main__.Exit.SKIPPED, "NotOptedIn"),
        ({"pillion.dev/policy": "llm", "pillion.dev/inject": "false"}, True, __main__.Exit.SKIPPED, "OptedOut"),
        ({"pillion.dev/policy": "llm"}, False, __main__.Exit.DENIED, "PolicyMissing"),
        ({"pillion.dev/policy": "other"}, True, __main__.Exit.DENIED, "PolicyMissing"),
        ({"pillion.dev/policy": "llm", "pillion.dev/job-id": "/"}, True, __main__.Exit.DENIED, "BadAnnotation"),
    ],
)
def test_the_exit_status_is_the_decision(
    annotations: dict[str, str],
    with_policy: bool,
    expected: int,
    reason: str,
    tmp_path: Path,
    policy_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is not injected says why, and a pod that would be refused is not printed."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a", "annotations": annotations},
        "spec": TEMPLATE["spec"],
    }
    arguments = ["inject", "-f", write(tmp_path, pod), *(["-p", policy_file] if with_policy else [])]
    assert __main__.main(arguments) == expected
    captured = capsys.readouterr()
    assert reason in captured.err
    assert (captured.out == "") is (expected == __main__.Exit.DENIED)


def test_a_training_job_without_pods_in_its_document_says_where_they_are(
    tmp_path: Path, policy_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A TrainJob's pods come from its runtime: nothing is injected, and the text says what to do instead."""
    job = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": "llama"}}
    assert __main__.main(["inject", "-f", write(tmp_path, job), "-p", policy_file]) == __main__.Exit.SKIPPED
    told = capsys.readouterr().err
    assert "TrainJob/llama: its pods are created by a training runtime" in told
    assert "inject its pods" in told


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` names the program and its release."""
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"pillion-operator {metadata.version('pillion-operator')}\n"


def test_what_cannot_be_read_has_a_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing file, a text that is no object, and a bad variable are told apart, each with a line that says which."""
    path = tmp_path / "text.yaml"
    path.write_text("just words")
    assert __main__.main(["inject", "-f", str(tmp_path / "none.yaml")]) == __main__.Exit.BAD_INPUT
    assert "none.yaml" in capsys.readouterr().err
    assert __main__.main(["inject", "-f", str(path)]) == __main__.Exit.BAD_INPUT
    assert "text.yaml" in capsys.readouterr().err
    monkeypatch.setenv("PILLION_LIVENESS", "Sometimes")
    assert __main__.main(["inject", "-f", str(path)]) == __main__.Exit.BAD_SETTINGS
    assert "PILLION_LIVENESS" in capsys.readouterr().err
