"""
The story: the operator may do what it needs, and nothing else.

Called from: pytest. What the code uses is compared with the chart in tests/chart; here the API server says what is granted.
"""

import subprocess

import pytest

from support.kube import Kube
from support.release import NAMESPACE, Release

DENIED = (
    ("create", "pods", "kube-system"),
    ("delete", "pods", "default"),
    ("patch", "pods", "default"),
    ("update", "pods", "default"),
    ("create", "pods/exec", "default"),
    ("get", "secrets", "default"),
    ("list", "secrets", NAMESPACE),
    ("get", "configmaps", "default"),
    ("patch", "jobs.batch", "default"),
    ("create", "checkpointpolicies.pillion.dev", "default"),
    ("delete", "checkpointpolicies.pillion.dev", "default"),
    ("patch", "checkpointpolicies.pillion.dev", "default"),
    ("create", "mutatingwebhookconfigurations", ""),
    ("delete", "mutatingwebhookconfigurations", ""),
    ("create", "clusterrolebindings", ""),
    ("impersonate", "users", ""),
    ("*", "*", ""),
)
ALLOWED = {
    "pillion-webhook": (("watch", "checkpointpolicies.pillion.dev", "default"),),
    "pillion-controller": (
        ("watch", "pods", "default"),
        ("create", "checkpoints.pillion.dev", "default"),
        ("patch", "checkpointpolicies.pillion.dev/status", "default"),
        ("create", "tokenreviews.authentication.k8s.io", ""),
    ),
}


@pytest.mark.parametrize("account", ALLOWED)
def test_an_account_of_ours_is_denied_what_it_has_no_use_for(release: Release, account: str) -> None:
    """Pods are never written, secrets of others never read, rights never given."""
    allowed = [case for case in DENIED if _answer(release.kube, account, *case)]
    assert allowed == []


@pytest.mark.parametrize("account", ALLOWED)
def test_an_account_of_ours_may_do_its_work(release: Release, account: str) -> None:
    """The same question answers yes for what the account does all day, so that a no above means something."""
    denied = [case for case in ALLOWED[account] if not _answer(release.kube, account, *case)]
    assert denied == []


def _answer(kube: Kube, account: str, verb: str, resource: str, namespace: str) -> bool:
    who = f"--as=system:serviceaccount:{NAMESPACE}:{account}"
    resource, _, sub = resource.partition("/")
    command = [str(kube.kubectl), f"--kubeconfig={kube.kubeconfig}", "auth", "can-i", verb, resource, who]
    command += [f"--subresource={sub}"] if sub else []
    command += [f"--namespace={namespace}"] if namespace else ["--all-namespaces"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    answer = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    assert answer in ("yes", "no"), answer
    return answer == "yes"
