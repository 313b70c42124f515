"""
The whole of: that what the chart calls things is what the operator's settings call them.

Called from: pytest.
Must never: repeat a name that the settings have; the settings are asked.
"""

import dataclasses
import json
from typing import Any, Final

import pytest
import yaml

from chart.variants import CA, CERT_MANAGER, VARIANTS
from pillion_operator import settings
from support import helm
from support.release import CHART, NAMESPACE

COMPONENTS: Final = ("webhook", "controller")
SCRAPERS: Final = ("serviceMonitor", "prometheusRule")
READ: Final = {each.metadata["env"] for each in dataclasses.fields(settings.Settings)}
"""The variables that the operator reads."""


def container(component: str, values: dict[str, Any]) -> helm.Json:
    """The one container of a Deployment."""
    found = helm.one(helm.render(values), "Deployment", f"pillion-{component}")
    (only,) = found["spec"]["template"]["spec"]["containers"]
    assert isinstance(only, dict)
    return only


def given(component: str, values: dict[str, Any]) -> dict[str, str]:
    """The environment of a Deployment; what the kubelet fills in is made up."""
    filled = {"metadata.namespace": NAMESPACE, "metadata.name": "pod", "status.podIP": "10.0.0.1"}
    return {
        each["name"]: each["value"] if "value" in each else filled[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container(component, values)["env"]
    }


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operator_starts_with_what_the_chart_sets(component: str, variant: str) -> None:
    """Every variable is one that the settings read, is set once, and has a value that they take."""
    names = [each["name"] for each in container(component, VARIANTS[variant])["env"]]
    assert len(names) == len(set(names))
    assert set(names) <= READ
    settings.from_env(given(component, VARIANTS[variant]), in_cluster=True)


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_charts_defaults_are_the_operators(component: str) -> None:
    """With the chart's defaults, only what a cluster is needed for differs from the settings' own defaults."""
    found = settings.from_env(given(component, {}), in_cluster=True)
    default = settings.Settings()
    differing = {
        each.name for each in dataclasses.fields(found) if getattr(found, each.name) != getattr(default, each.name)
    }
    assert differing == {"namespace", "pod_name", "pod_ip", "home_url"}


def test_the_chart_is_of_the_same_version_as_the_operator() -> None:
    """The default image of the sidecar, by the chart and by the operator's package, is one and the same."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == settings.Settings().sidecar_image.rpartition(":")[2]


def test_ports_are_those_that_the_operator_opens() -> None:
    """Each Deployment declares the ports of the settings, and the Services lead to them."""
    default = settings.Settings()
    webhook, controller = (
        {each["name"]: each["containerPort"] for each in container(component, {})["ports"]} for component in COMPONENTS
    )
    assert webhook == {"https": default.webhook_port, "health": default.health_port}
    assert controller == {"home": default.home_port, "health": default.health_port}
    ports = {
        each["metadata"]["name"]: {port["name"]: (port["port"], port["targetPort"]) for port in each["spec"]["ports"]}
        for each in helm.of_kind(helm.render({}), "Service")
    }
    assert ports == {
        default.webhook_service: {"https": (443, "https"), "metrics": (default.health_port, "health")},
        default.home_service: {"https": (443, default.home_port)},
        "pillion-controller": {"metrics": (default.health_port, "health")},
    }


def test_services_select_the_pods_that_they_are_for() -> None:
    """Webhook and metrics select their own Deployment's pods; call-home selects none, as the leader writes its address."""
    objects = helm.render({})
    for service in helm.of_kind(objects, "Service"):
        selector = service["spec"].get("selector")
        selected = {
            each["metadata"]["name"]
            for each in helm.of_kind(objects, "Deployment")
            if selector and selector.items() <= each["spec"]["template"]["metadata"]["labels"].items()
        }
        name = service["metadata"]["name"]
        assert selected == (set() if name == settings.Settings().home_service else {name})


def test_network_policies_let_in_what_the_operator_serves() -> None:
    """Each policy is about the pods of its Deployment, and opens the ports that they declare, to everybody where the values do not say."""
    objects = helm.render(VARIANTS["network-policy"])
    for component in COMPONENTS:
        spec = helm.one(objects, "NetworkPolicy", f"pillion-{component}")["spec"]
        selected = helm.one(objects, "Deployment", f"pillion-{component}")["spec"]["selector"]
        declared = {each["containerPort"] for each in container(component, {})["ports"]}
        assert spec["podSelector"] == selected
        assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} == declared
        assert all(rule.keys() == {"ports"} for rule in spec["ingress"])


def test_networks_of_the_values_are_who_is_let_in() -> None:
    """The webhook's port is the API server's alone, health is for those who measure, and sidecars call from everywhere."""
    objects = helm.render(VARIANTS["network-policy-of-networks"])

    def let_in(component: str) -> dict[int, list[str] | None]:
        ingress = helm.one(objects, "NetworkPolicy", f"pillion-{component}")["spec"]["ingress"]
        return {
            rule["ports"][0]["port"]: [each["ipBlock"]["cidr"] for each in rule["from"]] if "from" in rule else None
            for rule in ingress
        }

    assert let_in("webhook") == {10250: ["10.0.0.0/28", "fd00::/8"], 8080: ["10.1.0.0/16"]}
    assert let_in("controller") == {8444: None, 8080: ["10.1.0.0/16"]}


def test_the_webhooks_port_is_one_value() -> None:
    """`webhook.port` reaches the process, the pod and, by name, the Service; nothing else has the number."""
    values = VARIANTS["network-policy-of-networks"]
    assert settings.from_env(given("webhook", values), in_cluster=True).webhook_port == 10250
    assert {each["name"]: each["containerPort"] for each in container("webhook", values)["ports"]}["https"] == 10250
    assert "8443" not in json.dumps(helm.render(values))


def test_the_api_servers_certificate_reaches_the_webhook_alone() -> None:
    """Authority and names are settings of the webhook; the controller, whom all sidecars call, asks for no certificate."""
    values = VARIANTS["network-policy-of-networks"]
    found = settings.from_env(given("webhook", values), in_cluster=True)
    assert (found.webhook_client_ca, found.webhook_client_names) == (CA, "kube-apiserver,other")
    assert settings.from_env(given("controller", values), in_cluster=True).webhook_client_ca == ""


@pytest.mark.parametrize(
    ("monitoring", "named"),
    [({}, False), ({"jobSeries": True}, True), *(({each: {"enabled": True}}, True) for each in SCRAPERS)],
)
def test_names_of_jobs_are_in_metrics_where_somebody_asked_for_them(monitoring: dict[str, Any], named: bool) -> None:
    """By default /metrics, which everybody in the cluster can read, names no job; with a scraper of the chart's it does."""
    found = settings.from_env(given("controller", {"monitoring": monitoring}), in_cluster=True)
    assert found.job_series is named


def test_names_that_rights_are_given_for_are_the_operators() -> None:
    """The names in the rights of the controller are those of the Secrets, Lease, EndpointSlice and configuration that it writes."""
    default = settings.Settings()
    objects = helm.render({})
    named = {
        rule["resources"][0]: set(rule["resourceNames"])
        for kind in ("Role", "ClusterRole")
        for rule in helm.one(objects, kind, "pillion-controller")["rules"]
        if "resourceNames" in rule
    }
    assert named == {
        "secrets": {default.secret_name, default.authority_secret_name},
        "leases": {default.lease_name},
        "endpointslices": {default.home_service},
        "mutatingwebhookconfigurations": {default.webhook_configuration},
    }
    (webhook,) = helm.one(objects, "MutatingWebhookConfiguration", default.webhook_configuration)["webhooks"]
    assert webhook["clientConfig"]["service"]["name"] == default.webhook_service


def test_another_secret_is_named_everywhere() -> None:
    """`certificates.secretName` reaches the processes, the rights of both accounts, and cert-manager."""
    values = {"certificates": {"mode": "CertManager", "secretName": "ours"}}
    objects = helm.render(values)
    for component in COMPONENTS:
        assert given(component, values)["PILLION_SECRET_NAME"] == "ours"
        rules = helm.one(objects, "Role", f"pillion-{component}")["rules"]
        assert [each["resourceNames"] for each in rules if "secrets" in each["resources"]] == [["ours"]]
    assert helm.one(objects, "Certificate", "pillion")["spec"]["secretName"] == "ours"


def test_a_certificate_is_for_the_names_that_are_called() -> None:
    """cert-manager is asked for the names that the operator's own certificate has, that of the call-home address among them."""
    found = settings.from_env(given("controller", CERT_MANAGER), in_cluster=True)
    certificate = helm.one(helm.render(CERT_MANAGER), "Certificate", "pillion")
    assert certificate["spec"]["dnsNames"] == list(found.server_names())


def test_no_service_makes_a_variable_that_the_operator_reads() -> None:
    """Whoever starts the operator with Service links on (its Services in the same namespace) changes no setting by it."""
    made = set()
    for service in helm.of_kind(helm.render({}), "Service"):
        name = service["metadata"]["name"].upper().replace("-", "_")
        made |= {f"{name}_SERVICE_HOST", f"{name}_SERVICE_PORT", f"{name}_PORT"}
        for port in service["spec"]["ports"]:
            made.add(f"{name}_SERVICE_PORT_{port['name'].upper()}")
            made |= {f"{name}_PORT_{port['port']}_TCP{end}" for end in ("", "_PROTO", "_PORT", "_ADDR")}
    assert {"PILLION_WEBHOOK_PORT", "PILLION_HOME_SERVICE_HOST"} <= made
    assert made & READ == set()


def test_the_grace_of_a_pod_is_longer_than_the_operators() -> None:
    """The kubelet waits for longer than the webhook goes on serving after it was told to end."""
    for component in COMPONENTS:
        found = helm.one(helm.render({}), "Deployment", f"pillion-{component}")
        grace_s = found["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > settings.Settings().shutdown_grace_s


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_deployment_runs_its_own_command(component: str) -> None:
    """The image's entry point is the operator; the one argument is the component."""
    assert container(component, {})["args"] == [component]
    assert "command" not in container(component, {})
