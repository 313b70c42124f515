"""
The whole of: what a pod gets for a policy whose checkpoints are in an object store, and who in the pod has the credentials.

Called from: pytest. The golden records hold whole pods; each test here looks at one promise.
"""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from pillion_operator import offline
from pillion_operator.certificates import issue
from pillion_operator.injection import apply, checkpoint_policy, decide
from pillion_operator.injection.reasons import Reason
from pillion_operator.settings import Settings
from pillion_operator.webhook import review, server
from pillion_sidecar import settings as sidecar_settings
from pillion_sidecar.storage import opening

SETTINGS: Final = Settings(sidecar_image="example/pillion-sidecar:1", home_url="https://home")
ROLE: Final = "arn:aws:iam::123456789012:role/checkpoints"
WAYS: Final[dict[str, dict[str, Any]]] = {
    "secret": {"credentials": {"secret": "s3-writer"}},
    "role": {"credentials": {"awsRoleArn": ROLE}},
    "identity": {},
    "certificates": {"caBundle": {"configMap": "corp-ca", "key": "root.pem"}},
}


def a_policy(url: str = "s3://bucket/runs", sidecar: Any = None, **section: Any) -> checkpoint_policy.CheckpointPolicy:
    found = checkpoint_policy.from_object(
        {
            "trigger": {"periodSteps": 10},
            "staging": {"sizeLimit": "1Gi"},
            "storage": {"objectStore": {"url": url} | section},
            "sidecar": sidecar or {},
        }
    )
    assert found.problems == ()
    return found


def a_pod(**spec: Any) -> dict[str, Any]:
    marks = {"pillion.dev/policy": "llm", "pillion.dev/containers": "trainer"}
    metadata = {"name": "train", "namespace": "team-a", "annotations": marks}
    containers = [{"name": "trainer", "image": "example/train:1"}, {"name": "logs", "image": "example/logs:1"}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": containers} | spec}


def injected(policy: checkpoint_policy.CheckpointPolicy, pod: dict[str, Any] | None = None) -> decide.Inject:
    made = decide.inject(pod or a_pod(), policy, SETTINGS)
    assert isinstance(made, decide.Inject), decide.message(made)
    return made


def named(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(each for each in entries if each["name"] == name)


def sidecar_of(pod: dict[str, Any]) -> dict[str, Any]:
    return named(pod["spec"]["initContainers"], "pillion-sidecar")


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container.get("env", [])}


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("s3://bucket", "s3://bucket/team-a/train"),
        ("s3://bucket/", "s3://bucket/team-a/train"),
        ("gs://bucket/runs/llm", "gs://bucket/runs/llm/team-a/train"),
        ("az://container/runs/", "az://container/runs/team-a/train"),
    ],
)
def test_a_job_has_a_folder_below_the_one_of_its_namespace(url: str, root: str) -> None:
    """Namespaces share a bucket, and jobs of one name in two of them must not meet. Trainer and sidecar see the same root."""
    spec = injected(a_policy(url)).pod["spec"]
    assert environment(named(spec["containers"], "trainer"))["PILLION_ROOT"] == root
    assert environment(named(spec["initContainers"], "pillion-sidecar"))["PILLION_ROOT"] == root


@pytest.mark.parametrize("section", WAYS.values(), ids=WAYS.keys())
def test_an_object_store_is_no_volume_of_the_pod(section: dict[str, Any]) -> None:
    """No claim is mounted, so that no volume can be too small, on another node, or not writable."""
    pod = injected(a_policy(**section)).pod
    assert not any("persistentVolumeClaim" in each for each in pod["spec"]["volumes"])
    assert "/pillion/storage" not in {each["mountPath"] for each in sidecar_of(pod)["volumeMounts"]}


@pytest.mark.parametrize("section", WAYS.values(), ids=WAYS.keys())
def test_only_the_sidecar_has_what_the_storage_is_reached_with(section: dict[str, Any]) -> None:
    """No other container has a variable of the cloud's, a source of variables, or a mount of token or certificates."""
    spec = injected(a_policy(**section)).pod["spec"]
    for container in [*spec["containers"], named(spec["initContainers"], "pillion-client")]:
        assert "envFrom" not in container
        assert not [name for name in environment(container) if name.startswith("AWS_")]
        assert not [each for each in container.get("volumeMounts", []) if each["name"].startswith("pillion-storage")]


def test_a_secret_becomes_variables_of_the_sidecar() -> None:
    """By name: its values are in no object that injection writes. It comes last, where the kubelet lets a source win."""
    pod = injected(a_policy(**WAYS["secret"], sidecar={"envFrom": [{"secretRef": {"name": "proxy"}}]})).pod
    assert sidecar_of(pod)["envFrom"] == [{"secretRef": {"name": "proxy"}}, {"secretRef": {"name": "s3-writer"}}]


def test_a_secret_that_is_named_twice_is_read_once() -> None:
    """The same Secret in sidecar.envFrom and in the credentials is one source."""
    pod = injected(a_policy(**WAYS["secret"], sidecar={"envFrom": [{"secretRef": {"name": "s3-writer"}}]})).pod
    assert sidecar_of(pod)["envFrom"] == [{"secretRef": {"name": "s3-writer"}}]


def test_a_role_is_assumed_with_a_token_of_the_sidecars_own() -> None:
    """The token is for AWS alone, expires, and lies where the variable says; the pod's API token stays hidden."""
    pod = injected(a_policy(**WAYS["role"])).pod
    sidecar, env = sidecar_of(pod), environment(sidecar_of(pod))
    assert env["AWS_ROLE_ARN"] == ROLE
    source = named(pod["spec"]["volumes"], "pillion-storage-token")["projected"]["sources"][0]["serviceAccountToken"]
    assert source["audience"] == "sts.amazonaws.com"
    assert 600 <= source["expirationSeconds"] <= 86_400
    mount = named(sidecar["volumeMounts"], "pillion-storage-token")
    assert mount["readOnly"]
    assert env["AWS_WEB_IDENTITY_TOKEN_FILE"] == f"{mount['mountPath']}/{source['path']}"
    assert "/var/run/secrets/kubernetes.io/serviceaccount" in {each["mountPath"] for each in sidecar["volumeMounts"]}


def test_certificates_are_a_file_of_the_sidecar() -> None:
    """Whatever the key is called, the file is where PILLION_STORAGE_CA says, and the volume has no other."""
    pod = injected(a_policy(**WAYS["certificates"])).pod
    source = named(pod["spec"]["volumes"], "pillion-storage-ca")["configMap"]
    (item,) = source["items"]
    assert (source["name"], item["key"]) == ("corp-ca", "root.pem")
    mount = named(sidecar_of(pod)["volumeMounts"], "pillion-storage-ca")
    assert environment(sidecar_of(pod))["PILLION_STORAGE_CA"] == f"{mount['mountPath']}/{item['path']}"


def test_without_credentials_the_pods_identity_is_left_alone() -> None:
    """Injection sets none of the variables that a cloud's own webhook sets, and takes none away from a declared sidecar."""
    own = {
        "name": "pillion-sidecar",
        "restartPolicy": "Always",
        "env": [{"name": "AWS_ROLE_ARN", "value": "of-the-pod"}],
    }
    assert environment(sidecar_of(injected(a_policy()).pod)).keys().isdisjoint({"AWS_ROLE_ARN", "AWS_ACCESS_KEY_ID"})
    pod = injected(a_policy(), a_pod(initContainers=[own])).pod
    assert environment(sidecar_of(pod))["AWS_ROLE_ARN"] == "of-the-pod"


def test_the_policys_role_wins_over_the_pods() -> None:
    """Two roles would leave open who writes; the pod's own variable comes back when the sidecar is taken out."""
    own = {
        "name": "pillion-sidecar",
        "restartPolicy": "Always",
        "env": [{"name": "AWS_ROLE_ARN", "value": "of-the-pod"}],
    }
    bare = a_pod(initContainers=[own])
    done = injected(a_policy(**WAYS["role"]), bare).pod
    assert environment(sidecar_of(done))["AWS_ROLE_ARN"] == ROLE
    assert apply.remove(done) == bare


@pytest.mark.parametrize("volume", ["pillion-storage", "pillion-storage-ca", "pillion-storage-token"])
def test_a_volume_of_a_reserved_name_is_refused(volume: str) -> None:
    """A volume of the pod's own would be mounted in place of the one that injection adds."""
    made = decide.inject(a_pod(volumes=[{"name": volume, "emptyDir": {}}]), a_policy(), SETTINGS)
    assert isinstance(made, decide.Deny)
    assert (made.reason, made.details) == (Reason.RESERVED_NAME, (f"volume {volume}",))


def test_a_pod_without_a_user_is_no_doubt_there() -> None:
    """Who may write is a matter of credentials, and not of a user; with a claim the same pod gets a warning."""
    assert injected(a_policy()).warnings == ()


@pytest.mark.parametrize("host", ["minio.storage.svc", "minio.storage.svc.cluster.local"])
def test_an_endpoint_that_the_nodes_resolver_does_not_know_is_a_doubt(host: str) -> None:
    """With hostNetwork a Service is not found by its name; an address outside the cluster is."""
    inside, outside = a_policy(endpoint=f"https://{host}:9000"), a_policy(endpoint="https://minio.example:9000")
    (warning,) = injected(inside, a_pod(hostNetwork=True)).warnings
    assert "cannot reach the object store" in warning
    assert injected(outside, a_pod(hostNetwork=True)).warnings == ()
    assert injected(inside).warnings == ()


def test_a_pod_that_is_made_gets_the_namespace_of_the_request() -> None:
    """The API server may send a pod without its namespace, and the request has it."""
    pod = a_pod()
    del pod["metadata"]["namespace"]

    class Policies:
        async def find(self, namespace: str, name: str) -> checkpoint_policy.CheckpointPolicy:
            return a_policy()

    policies: Any = Policies()
    refusals: Any = None
    asked = review.Question(uid="1", namespace="team-b", pod=pod, is_dry_run=False)

    async def decided() -> decide.Decision:
        until_s = asyncio.get_running_loop().time() + server.DEADLINE_S
        return await server.Server(policies, refusals, SETTINGS).decision(asked, until_s)

    made = asyncio.run(decided())
    assert isinstance(made, decide.Inject)
    assert environment(sidecar_of(made.pod))["PILLION_ROOT"] == "s3://bucket/runs/team-b/train"


def test_a_template_gets_the_namespace_of_its_document_and_is_refused_without_one() -> None:
    """A root without the namespace would be another one than the webhook's, where the job finds no checkpoint."""
    template = a_pod()
    del template["metadata"]["namespace"], template["metadata"]["name"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, "spec": {"template": template}}
    _, (outcome,) = offline.inject([job], [a_policy()], SETTINGS)
    assert isinstance(outcome.decision, decide.Deny)
    assert outcome.decision.reason is Reason.UNSUPPORTED_POD
    assert "metadata.namespace" in outcome.decision.details[0]
    job["metadata"] = {"name": "train", "namespace": "team-a"}
    (document,), _ = offline.inject([job], [a_policy()], SETTINGS)
    env = environment(sidecar_of(document["spec"]["template"]))
    assert env["PILLION_ROOT"] == "s3://bucket/runs/team-a/train"


def test_the_sidecar_opens_the_folder_that_injection_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the container is started with is what the sidecar reads: root, policy, certificates, all of them by their names."""
    policy = a_policy("az://container/runs/", **WAYS["certificates"], parallelism=8)
    env = environment(sidecar_of(injected(policy).pod))
    # The kubelet reads $$ as one $.
    read = sidecar_settings.from_arguments([], {name: value.replace("$$", "$") for name, value in env.items()})
    assert read.storage_ca == "/pillion/storage-ca/ca.crt"
    certificates = tmp_path / "ca.crt"
    certificates.write_text(issue.make_authority(datetime.now(UTC)).certificate)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    options = sidecar_settings.read_policy(read.policy).storage.object_store
    folder = opening.open_folder(read.root, options, ca_file=str(certificates))
    assert str(folder) == read.root == "az://container/runs/team-a/train"
    assert options is not None
    assert options.parallelism == 8
