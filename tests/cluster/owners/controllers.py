"""
The whole of: controllers of other projects on the built cluster: their own manifests, roles and webhooks, and images that are built here.

Called from: the fixtures of tests/cluster/owners.
Must never: change what the manifests say but the image, its arguments and resources; or leave out a webhook that pods or jobs pass.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from cluster.harness import binaries, images, progress
from cluster.harness.built import Built
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube
from support.release import Release

LOOK_S: Final = 5
RESOURCES: Final = {"requests": {"cpu": "50m", "memory": "64Mi"}}
_INIT_CONTAINER: Final = f"""\
- name: init-pytorch
  image: {jobs.IMAGE}
  imagePullPolicy: Never
  command:
  - {jobs.PYTHON}
  - -c
  - |
    import socket, sys, time
    for _ in range(120):
        try:
            sys.exit(0 if socket.getaddrinfo("{{{{.MasterAddr}}}}", None) else 1)
        except socket.gaierror:
            time.sleep(1)
    sys.exit("the master has no address")
"""
"""What the training operator puts before a worker's trainer; its own asks for an image that no node here has."""


@dataclass(frozen=True, slots=True)
class Controller:
    """One controller, by its objects."""

    kube: Kube
    """In its namespace."""
    deployment: str
    documents: Sequence[Json]

    def install(self) -> None:
        """Apply its objects, and wait until it is available. Blocks: up to Deadline.OWNERS_READY."""
        with progress.step(f"installing {self.deployment}"):
            self._run("apply", "--server-side", "--force-conflicts")
            self.kube.until(self._available, Deadline.OWNERS_READY, f"{self.deployment} to be available")

    def remove(self) -> None:
        """Delete its objects; what is not there is no error."""
        self._run("delete", "--ignore-not-found", "--wait=false")

    def _run(self, *command: str) -> None:
        given = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(self.documents)})
        self.kube.run(*command, "-f", "-", given=given, deadline=Deadline.OWNERS_READY)

    def _available(self) -> bool:
        # A pod that has changed is looked at by its kubelet now, with the Secrets that it mounts; else within a minute and a half.
        look = f"pillion-test/look={int(time.monotonic()) // LOOK_S}"
        self.kube.run("annotate", "pods", "--all", "--overwrite", look)
        found = self.kube.get("deployment", self.deployment) or {}
        return bool(found.get("status", {}).get("availableReplicas"))


def training_operator(cluster: Built) -> Controller:
    """Kubeflow's training operator, of the kinds that it knows for PyTorchJobs alone."""
    image = images.of_a_program("training-operator", {"/etc/config/initContainer.yaml": _INIT_CONTAINER})
    cluster.load([image])
    kube = Kube(cluster.kubectl, cluster.kubeconfig, "kubeflow")
    source = binaries.source("training-operator", "github.com/kubeflow/training-operator")
    documents = _documents(kube.run("kustomize", str(source / "manifests" / "overlays" / "standalone")))
    _run_image(documents, image, ["--enable-scheme=pytorchjob"])
    return Controller(kube, "training-operator", documents)


def kuberay(cluster: Built) -> Controller:
    """The KubeRay operator."""
    image = images.of_a_program("ray-operator")
    cluster.load([image])
    kube = Kube(cluster.kubectl, cluster.kubeconfig, "default")
    source = binaries.source("ray-operator", "github.com/ray-project/kuberay/ray-operator")
    documents = _documents(kube.run("kustomize", str(source / "config" / "default")))
    _run_image(documents, image)
    return Controller(kube, "kuberay-operator", documents)


def kueue(cluster: Built, release: Release) -> Controller:
    """Kueue, from its own chart, for Jobs and pods. Without its API of queues' contents, which nothing here aggregates."""
    image = images.of_a_program("kueue")
    cluster.load([image])
    source = binaries.source("kueue", "sigs.k8s.io/kueue")
    chart = source / "charts" / "kueue"
    values = yaml.safe_load((chart / "values.yaml").read_text())
    config = yaml.safe_load(values["managerConfig"]["controllerManagerConfigYaml"])
    config["integrations"]["frameworks"] = ["batch/job", "pod"]
    config["leaderElection"]["leaderElect"] = False
    given = {
        "managerConfig": {"controllerManagerConfigYaml": yaml.safe_dump(config)},
        "controllerManager": {"featureGates": [{"name": "VisibilityOnDemand", "enabled": False}]},
    }
    kube = Kube(cluster.kubectl, cluster.kubeconfig, "kueue-system")
    text = release.run(
        "template", "kueue", str(chart), f"--namespace={kube.namespace}", "-f", "-", given=json.dumps(given)
    )
    documents = [_namespace(kube.namespace)]
    for each in _documents(text):
        if "visibility" not in each["metadata"]["name"]:
            # Its webhook configurations name a namespace, and are in none.
            if each["kind"].endswith("WebhookConfiguration"):
                each["metadata"].pop("namespace", None)
            documents.append(each)
    _run_image(documents, image)
    return Controller(kube, "kueue-controller-manager", documents)


def cert_manager(cluster: Built) -> Controller:
    """cert-manager's controllers and its injector, without its own webhook, which only checks what people write."""
    image = images.of_a_program("cert-manager")
    cluster.load([image])
    kube = Kube(cluster.kubectl, cluster.kubeconfig, "cert-manager")
    source = binaries.source("cert-manager", "github.com/cert-manager/cert-manager")
    documents = [_namespace(kube.namespace)]
    for path in sorted((source / "deploy" / "crds").glob("*.yaml")):
        documents += _documents(path.read_text())
    name, labels = kube.namespace, {"app": "cert-manager"}
    documents += [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": name}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "pillion-test-cert-manager"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": name}],
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "namespace": name, "labels": labels},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "serviceAccountName": name,
                        "securityContext": {"runAsNonRoot": True},
                        "containers": [{"name": "manager"}],
                    },
                },
            },
        },
    ]
    _run_image(documents, image)
    return Controller(kube, name, documents)


def _documents(text: str) -> list[Json]:
    # The loader that is C: their CRDs are tens of thousands of lines.
    return [each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each]


def _namespace(name: str) -> Json:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _run_image(documents: Sequence[Json], image: str, arguments: Sequence[str] | None = None) -> None:
    """Let the one Deployment run an image that is on the nodes, within what two cores can spare."""
    (deployment,) = [each for each in documents if each["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    changed: dict[str, Any] = {"image": image, "imagePullPolicy": "Never", "resources": RESOURCES}
    if arguments is not None:
        changed["args"] = list(arguments)
    container.update(changed)
