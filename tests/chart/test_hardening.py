"""
The whole of: that no pod of the chart can do more on its node than it needs.

Called from: pytest.
Must never: look at one pod by its name; whatever has a pod template is looked at.
"""

from typing import Final

import pytest

from chart.variants import VARIANTS
from support import helm
from support.release import ROOT

RESTRICTED: Final = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
"""Exactly, and nothing beside it: `privileged` is not there, nor an added capability."""
OF_POD: Final = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
"""And no user: the image has one, and OpenShift refuses a pod that names another than its namespace's."""
HOST: Final = ("hostPID", "hostIPC", "hostNetwork", "volumes", "shareProcessNamespace")
"""What a pod could reach its node by. None has volumes: nothing is written, and certificates are read through the API."""


def pods(variant: str) -> dict[str, helm.Json]:
    """The specs of all pods by the name of what makes them."""
    objects = helm.render(VARIANTS[variant])
    made = {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in objects if "template" in _spec(each)}
    return made | {each["metadata"]["name"]: each["spec"] for each in helm.of_kind(objects, "Pod")}


def _spec(found: helm.Json) -> helm.Json:
    spec: helm.Json = found.get("spec") or {}
    return spec


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_is_as_restricted_as_kubernetes_can_make_it(variant: str) -> None:
    """No root, no writable root, no capability, no way to more rights, the runtime's filter of system calls."""
    found = pods(variant)
    assert found.keys() == {"pillion-webhook", "pillion-controller", "pillion-test"}
    for name, spec in found.items():
        assert spec["securityContext"] == OF_POD, name
        assert "initContainers" not in spec, name
        for container in spec["containers"]:
            assert container["securityContext"] == RESTRICTED, name


def test_the_images_say_who_runs_in_them() -> None:
    """Both end as the same user by number, as the kubelet asks of a pod that must not be root and names no user."""
    users = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("USER ")]
    assert users == ["USER 65532:65532"] * 2


def test_no_pod_reaches_its_node() -> None:
    """By default no pod shares anything with its node; `webhook.hostNetwork` gives the network, to the webhook alone."""
    assert {(name, key) for name, spec in pods("defaults").items() for key in HOST if key in spec} == set()
    shared = {(name, key) for name, spec in pods("placed").items() for key in HOST if key in spec}
    assert shared == {("pillion-webhook", "hostNetwork")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_container_has_its_bounds(variant: str) -> None:
    """CPU and memory are requested, memory is limited, and the request is not above the limit."""
    for name, spec in pods(variant).items():
        for container in spec["containers"]:
            resources = container["resources"]
            assert resources["requests"].keys() == {"cpu", "memory"}, name
            least, most = (int(resources[key]["memory"].removesuffix("Mi")) for key in ("requests", "limits"))
            assert least <= most, name


def test_no_pod_gets_the_variables_of_services() -> None:
    """The kubelet adds no variables of Services: some are called as the operator's own."""
    assert {spec["enableServiceLinks"] for spec in pods("defaults").values()} == {False}


@pytest.mark.parametrize("component", ["webhook", "controller"])
def test_a_deployment_is_probed_at_a_port_that_it_has(component: str) -> None:
    """Readiness and liveness ask different paths of a port that the container declares."""
    (container,) = pods("defaults")[f"pillion-{component}"]["containers"]
    ports = {each["name"] for each in container["ports"]}
    probes = [container[kind]["httpGet"] for kind in ("readinessProbe", "livenessProbe")]
    assert [each["path"] for each in probes] == ["/readyz", "/healthz"]
    assert {each["port"] for each in probes} <= ports
    # Liveness gives more time than readiness: a replica that is busy is taken out, not killed.
    patience_s = [container[kind]["periodSeconds"] for kind in ("readinessProbe", "livenessProbe")]
    assert patience_s[0] < patience_s[1]


@pytest.mark.parametrize("component", ["webhook", "controller"])
def test_a_deployment_stays_available_while_it_changes(component: str) -> None:
    """Two replicas, spread over nodes; none goes before its successor is ready, and a drain leaves one."""
    objects = helm.render({})
    spec = helm.one(objects, "Deployment", f"pillion-{component}")["spec"]
    assert spec["replicas"] == 2
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    budget = helm.one(objects, "PodDisruptionBudget", f"pillion-{component}")["spec"]
    selected = spec["selector"]
    (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]
    assert budget == {"minAvailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow", "selector": selected}
    assert spread["labelSelector"] == selected
    assert selected["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_a_webhook_on_the_hosts_network_can_be_replaced() -> None:
    """Its ports are taken on its node, so that one replica goes first; all others go last."""
    found = {
        (variant, component): helm.one(helm.render(VARIANTS[variant]), "Deployment", f"pillion-{component}")["spec"]
        for variant in ("defaults", "placed")
        for component in ("webhook", "controller")
    }
    first = {key for key, spec in found.items() if spec["strategy"]["rollingUpdate"]["maxSurge"] == 0}
    assert first == {("placed", "webhook")}
    assert found["placed", "webhook"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 1
