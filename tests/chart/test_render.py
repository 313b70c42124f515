"""
The whole of: that the chart renders to objects that Kubernetes knows, with every switch, and carries what is copied into it unchanged.

Called from: pytest.
Must never: pass over a kind that nobody listed.
"""

import functools
import json
import subprocess
import sys
from typing import Any, Final

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml

from chart.variants import VARIANTS
from support import helm
from support.deadlines import Deadline
from support.release import CHART, NAMESPACE, ROOT

FOREIGN: Final = {
    ("cert-manager.io/v1", "Certificate"),
    ("cert-manager.io/v1", "Issuer"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"),
}
"""Kinds of other projects, which Kubernetes' schemas do not know."""
IN_CLUSTER: Final = {
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "MutatingWebhookConfiguration",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}
"""Kinds without a namespace. All others name the release's, but for the rights of `helm test`."""
GUARD: Final = {
    ("ValidatingAdmissionPolicy", "pillion-controller"),
    ("ValidatingAdmissionPolicyBinding", "pillion-controller"),
}
"""What holds the controller to the caBundle, where it writes one."""
CHANGES: Final = {
    "cert-manager": {
        *GUARD,
        ("Issuer", "pillion-self-signed"),
        ("Certificate", "pillion-authority"),
        ("Issuer", "pillion"),
        ("Certificate", "pillion"),
    },
    "cert-manager-issuer": {*GUARD, ("Certificate", "pillion")},
    "provided": GUARD,
    "monitoring": {("ServiceMonitor", "pillion"), ("PrometheusRule", "pillion"), ("ConfigMap", "pillion-dashboard")},
    "network-policy": {("NetworkPolicy", "pillion-webhook"), ("NetworkPolicy", "pillion-controller")},
    "network-policy-of-networks": {("NetworkPolicy", "pillion-webhook"), ("NetworkPolicy", "pillion-controller")},
    "no-validation": {
        *GUARD,
        *(
            (kind, name)
            for kind in ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
            for name in ("pillion", "pillion-status")
        ),
    },
    "no-crds": {
        ("CustomResourceDefinition", "checkpointpolicies.pillion.dev"),
        ("CustomResourceDefinition", "checkpoints.pillion.dev"),
    },
    "one-replica": {("PodDisruptionBudget", "pillion-webhook"), ("PodDisruptionBudget", "pillion-controller")},
    "no-user-roles": {("ClusterRole", "pillion-edit"), ("ClusterRole", "pillion-view")},
    "no-disruption-budget": {("PodDisruptionBudget", "pillion-webhook"), ("PodDisruptionBudget", "pillion-controller")},
}
"""By variant: the objects that it adds to the defaults, or takes away. The others change none."""


def test_lint_finds_nothing() -> None:
    """`helm lint --strict` has neither an error nor a warning."""
    assert "0 chart(s) failed" in helm.run("lint", "--strict", str(CHART))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_is_one_that_kubernetes_knows(variant: str) -> None:
    """Each rendered object is valid by Kubernetes' own schema, with no field that it does not know."""
    problems = [problem for each in helm.render(VARIANTS[variant]) if (problem := _problem(json.dumps(each)))]
    assert problems == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_object_is_there_twice(variant: str) -> None:
    """No two objects have kind, namespace and name in common: helm would install one of them."""
    keys = [_key(each) for each in helm.render(VARIANTS[variant])]
    assert len(keys) == len(set(keys)), sorted(key for key in keys if keys.count(key) > 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_says_where_it_belongs(variant: str) -> None:
    """What lies in a namespace names the release's, so that `helm template | kubectl apply` puts it there; the rest names none."""
    for each in helm.render(VARIANTS[variant]):
        is_test_right = each["metadata"]["name"] == "pillion-test" and each["kind"] in ("Role", "RoleBinding")
        wanted = None if each["kind"] in IN_CLUSTER else "default" if is_test_right else NAMESPACE
        assert each["metadata"].get("namespace") == wanted, _key(each)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_switch_changes_what_it_says_and_no_more(variant: str) -> None:
    """Each switch adds or takes away the objects that it is about, and leaves all others there."""
    before, after = ({_key(each)[::2] for each in helm.render(values)} for values in ({}, VARIANTS[variant]))
    assert before ^ after == CHANGES.get(variant, set())


def test_an_uninstall_leaves_the_crds_unless_it_is_told_otherwise() -> None:
    """By default helm keeps the CRDs, and with them all policies; `crds.keep: false` takes that away."""
    kept = [
        {each["metadata"]["annotations"].get("helm.sh/resource-policy") for each in _crds(VARIANTS[variant])}
        for variant in ("defaults", "crds-not-kept")
    ]
    assert kept == [{"keep"}, {None}]


def test_the_charts_copy_of_the_crds_is_in_step() -> None:
    """`tools/sync_crds.py --check` finds nothing, and what is rendered is what lies in crds/, but for annotations."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "sync_crds.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=Deadline.PROCESS_START.s,
    )
    assert (done.returncode, done.stdout) == (0, "")
    sources = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))]
    rendered = {each["metadata"]["name"]: each["spec"] for each in _crds({})}
    assert rendered == {each["metadata"]["name"]: each["spec"] for each in sources}


def test_the_program_of_helm_test_arrives_unchanged() -> None:
    """`files/admission_test.py` is Python, and the pod of `helm test` is given its very text."""
    path = CHART / "files" / "admission_test.py"
    (container,) = helm.one(helm.render({}), "Pod", "pillion-test")["spec"]["containers"]
    assert container["args"] == [path.read_text()]
    compile(container["args"][0], path.name, "exec")


def test_the_pod_of_helm_test_has_the_variables_that_its_program_reads() -> None:
    """Every variable that the program takes from the environment is set, or one that the kubelet sets in each pod."""
    text = (CHART / "files" / "admission_test.py").read_text()
    (container,) = helm.one(helm.render({}), "Pod", "pillion-test")["spec"]["containers"]
    given = {each["name"] for each in container["env"]}
    read = {part.split("]")[0].strip("'\"") for part in text.split("os.environ[")[1:]}
    assert given == read - {"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"}


def _crds(values: dict[str, Any]) -> list[helm.Json]:
    return helm.of_kind(helm.render(values), "CustomResourceDefinition")


def _key(found: helm.Json) -> tuple[str, str, str]:
    return found["kind"], found["metadata"].get("namespace", ""), found["metadata"]["name"]


@functools.cache
def _problem(text: str) -> str:
    """What is wrong with an object; most are the same in all variants, and looked at once."""
    found = json.loads(text)
    if (found["apiVersion"], found["kind"]) in FOREIGN:
        return ""
    try:
        kubernetes_validate.validate(found, helm.KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as err:
        return f"{_key(found)}: {list(err.path)}: {err.message}"
    return ""
