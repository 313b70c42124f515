"""
The whole of: what the API server is told about the webhook, and about the check behind it.

Called from: pytest. The record is written out here, so that a change of it is read by people.
Must never: be made from what is rendered.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any, Final

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest

from chart.variants import CA, CERT_MANAGER, PROVIDED, VARIANTS
from pillion_operator.injection import annotations
from support import helm
from support.release import NAMESPACE

WEBHOOK: Final[dict[str, Any]] = {
    "name": "inject.pillion.dev",
    "admissionReviewVersions": ["v1"],
    "clientConfig": {
        "service": {"name": "pillion-webhook", "namespace": NAMESPACE, "path": "/mutate", "port": 443},
    },
    "rules": [
        {
            "operations": ["CREATE"],
            "apiGroups": [""],
            "apiVersions": ["v1"],
            "resources": ["pods"],
            "scope": "Namespaced",
        }
    ],
    "matchPolicy": "Equivalent",
    "failurePolicy": "Fail",
    "sideEffects": "NoneOnDryRun",
    "timeoutSeconds": 5,
    "reinvocationPolicy": "IfNeeded",
    "namespaceSelector": {
        "matchExpressions": [
            {
                "key": "kubernetes.io/metadata.name",
                "operator": "NotIn",
                "values": ["kube-system", "kube-public", "kube-node-lease", NAMESPACE],
            },
            {"key": "pillion.dev/injection", "operator": "NotIn", "values": ["disabled"]},
        ]
    },
    "matchConditions": [
        {
            "name": "opted-in",
            "expression": "object.metadata.?annotations['pillion.dev/policy'].orValue('') != ''",
        },
        {
            "name": "not-a-mirror-pod",
            "expression": "!('kubernetes.io/config.mirror' in object.metadata.?annotations.orValue({}))",
        },
    ],
}
"""With the defaults. No caBundle: the controller writes it."""
INJECT_CA: Final = {"cert-manager.io/inject-ca-from": f"{NAMESPACE}/pillion"}


def configuration(values: dict[str, Any]) -> helm.Json:
    """The webhook configuration."""
    return helm.one(helm.render(values), "MutatingWebhookConfiguration", "pillion")


def test_the_webhook_is_registered_for_pods_that_opted_in() -> None:
    """With the defaults the configuration is the one in the record, without an annotation."""
    found = configuration({})
    assert found["webhooks"] == [WEBHOOK]
    assert "annotations" not in found["metadata"]


def test_a_provided_authority_is_in_the_configuration() -> None:
    """With certificates.mode Provided the caBundle is the one of the values, and nothing else differs."""
    found = configuration(PROVIDED)
    (webhook,) = found["webhooks"]
    assert base64.b64decode(webhook["clientConfig"]["caBundle"]).decode() == CA
    assert webhook | {"clientConfig": WEBHOOK["clientConfig"]} == WEBHOOK
    assert "annotations" not in found["metadata"]


def test_cert_manager_is_asked_for_the_authority() -> None:
    """With certificates.mode CertManager an annotation names the Certificate, which is there, and there is no caBundle."""
    found = configuration(CERT_MANAGER)
    assert found["webhooks"] == [WEBHOOK]
    assert found["metadata"]["annotations"] == INJECT_CA
    assert helm.one(helm.render(CERT_MANAGER), "Certificate", "pillion")["metadata"]["namespace"] == NAMESPACE


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_webhook_cannot_keep_itself_from_starting(values: dict[str, Any]) -> None:
    """Whatever is set, the release's namespace and those of the control plane are never looked at."""
    (webhook,) = configuration(values)["webhooks"]
    excluded = webhook["namespaceSelector"]["matchExpressions"][0]["values"]
    assert {NAMESPACE, "kube-system"} <= set(excluded)


def test_values_reach_the_configuration() -> None:
    """Failure policy, timeout and excluded namespaces are those of the values."""
    values = {"webhook": {"failurePolicy": "Ignore", "timeoutSeconds": 7, "excludedNamespaces": ["vault"]}}
    (webhook,) = configuration(values)["webhooks"]
    excluded = webhook["namespaceSelector"]["matchExpressions"][0]["values"]
    assert (webhook["failurePolicy"], webhook["timeoutSeconds"], excluded[-1]) == ("Ignore", 7, "vault")


def test_a_pod_whose_sidecar_lost_its_restart_policy_is_refused() -> None:
    """The policy behind the webhook is about injected pods only, denies, and refuses when it cannot be evaluated."""
    objects = helm.render({})
    spec = helm.one(objects, "ValidatingAdmissionPolicy", "pillion")["spec"]
    binding = helm.one(objects, "ValidatingAdmissionPolicyBinding", "pillion")["spec"]
    assert spec["failurePolicy"] == "Fail"
    assert spec["matchConstraints"]["objectSelector"] == {"matchLabels": {"pillion.dev/injected": "true"}}
    assert binding == {"policyName": "pillion", "validationActions": ["Deny"]}


def policy(name: str, values: dict[str, Any]) -> tuple[helm.Json, helm.Json]:
    """The spec of a ValidatingAdmissionPolicy and of its binding."""
    objects = helm.render(values)
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    spec, binding = (helm.one(objects, kind, name)["spec"] for kind in kinds)
    return spec, binding


def test_what_injection_wrote_on_a_pod_does_not_change() -> None:
    """A change of the status annotation or of the label is refused, on injected pods only, and no creation is looked at."""
    spec, binding = policy("pillion-status", {})
    (rule,) = spec["matchConstraints"]["resourceRules"]
    assert (rule["operations"], rule["resources"]) == (["UPDATE"], ["pods"])
    assert spec["matchConstraints"]["objectSelector"] == {"matchLabels": {annotations.INJECTED: "true"}}
    compared = [each["expression"] for each in spec["validations"]]
    assert all(part in text for part, text in zip((annotations.STATUS, annotations.INJECTED), compared, strict=True))
    assert all("object.metadata" in text and "oldObject.metadata" in text for text in compared)
    assert binding == {"policyName": "pillion-status", "validationActions": ["Deny"]}


def test_the_controller_is_held_to_the_bundle_of_certificates() -> None:
    """The policy is about its account alone, and compares every field of a webhook that Kubernetes knows, but the caBundle."""
    spec, binding = policy("pillion-controller", {})
    (condition,) = spec["matchConditions"]
    assert condition["expression"].endswith(f"== 'system:serviceaccount:{NAMESPACE}:pillion-controller'")
    assert spec["failurePolicy"] == "Fail"
    assert binding == {"policyName": "pillion-controller", "validationActions": ["Deny"]}
    text = spec["validations"][1]["expression"]
    own, of_client = (set(re.findall(rf"new\.{prefix}\??\.?\??(\w+) == old", text)) for prefix in ("", "clientConfig"))
    assert own | {"clientConfig"} == fields("MutatingWebhook")
    assert of_client | {"caBundle"} == fields("WebhookClientConfig")


def fields(kind: str) -> set[str]:
    """The fields of a type of admissionregistration.k8s.io/v1, as the schema of the newest Kubernetes that is known here has them."""
    schemas = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    newest = max(schemas.glob("v*-local"), key=lambda each: [int(part) for part in re.findall(r"\d+", each.name)])
    definitions = json.loads((newest / "_definitions.json").read_text())["$defs"]
    return set(definitions[f"io.k8s.api.admissionregistration.v1.{kind}"]["properties"])
