"""
The story: cert-manager issues the operator's certificate, and renews it, while pods are admitted.

Called from: pytest.
"""

import base64
import json
import ssl
import sys
from collections.abc import Iterator
from typing import Final

import pytest

from cluster.conftest import Training
from cluster.harness.built import CONTROL, Built
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube, KubectlFailed, condition
from support.release import Release

SECRET: Final = "pillion-tls"
PORT: Final = 8443
SERVED: Final = "import ssl, sys; print(ssl.get_server_certificate((sys.argv[1], int(sys.argv[2])), timeout=5))"


@pytest.fixture
def with_cert_manager(release: Release, cert_manager: object) -> Iterator[Kube]:
    """The release's namespace, with certificates by cert-manager; afterwards by the operator itself again."""
    del cert_manager
    release.install({"certificates": {"mode": "CertManager"}})
    yield release.kube
    release.install()


def data(kube: Kube, key: str) -> str:
    """One value of the operator's Secret, PEM."""
    secret = kube.get("secret", SECRET)
    assert secret is not None
    return base64.b64decode(secret["data"][key]).decode()


def webhooks(kube: Kube) -> list[Json]:
    """The webhook's pods that are to stay."""
    found = kube.all("pods", "app.kubernetes.io/component=webhook")
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def served(built: Built, pod: Json) -> bytes:
    """The certificate that a webhook's pod serves."""
    text = built.machines[CONTROL].exec(sys.executable, "-c", SERVED, pod["status"]["podIP"], str(PORT))
    return ssl.PEM_cert_to_DER_cert(text.strip())


def all_serve(built: Built, kube: Kube) -> str:
    """What is in the Secret, once each webhook's pod serves it and the API server trusts its authority; to be polled."""
    chain = data(kube, "tls.crt")
    leaf = ssl.PEM_cert_to_DER_cert(chain.partition(ssl.PEM_FOOTER)[0] + ssl.PEM_FOOTER)
    assert [served(built, pod) == leaf for pod in webhooks(kube)] == [True, True]
    configuration = kube.get("mutatingwebhookconfiguration", "pillion")
    assert configuration is not None
    bundle = base64.b64decode(configuration["webhooks"][0]["clientConfig"]["caBundle"]).decode()
    # cert-manager adds its authority to those that are there, such as the operator's own of before.
    assert data(kube, "ca.crt").strip() in bundle
    return chain


def admitted(kube: Kube) -> bool:
    """Whether a pod that opted in is injected just now."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "annotations": {"pillion.dev/policy": "llm"}},
        "spec": {"containers": [{"name": "main", "image": jobs.IMAGE}]},
    }
    try:
        shown = json.loads(kube.run("create", "--dry-run=server", "-o", "json", "-f", "-", given=json.dumps(pod)))
    except KubectlFailed as err:
        pytest.fail(f"a pod was refused: {err}")
    return "pillion-sidecar" in [each["name"] for each in shown["spec"]["initContainers"]]


def renew(kube: Kube) -> None:
    """Ask cert-manager for a new certificate now, as its command line does."""
    certificate = kube.get("certificate.cert-manager.io", "pillion")
    assert certificate is not None
    conditions = [each for each in certificate["status"]["conditions"] if each["type"] != "Issuing"]
    conditions.append(
        {
            "type": "Issuing",
            "status": "True",
            "reason": "ManuallyTriggered",
            "message": "Certificate re-issuance manually triggered",
            "observedGeneration": certificate["metadata"]["generation"],
            "lastTransitionTime": certificate["metadata"]["creationTimestamp"],
        }
    )
    patch = json.dumps({"status": {"conditions": conditions}})
    kube.run("patch", "certificate.cert-manager.io", "pillion", "--subresource=status", "--type=merge", "-p", patch)


def test_the_webhook_serves_what_cert_manager_issues_and_renews(
    training: Training, with_cert_manager: Kube, built: Built
) -> None:
    """The certificate is cert-manager's, a renewed one is served at once by the same pods, and no pod and no report is refused meanwhile."""
    kube, system = training.kube, with_cert_manager
    kube.until(
        lambda: condition(system.get("certificate.cert-manager.io", "pillion"), "Ready").get("status") == "True",
        Deadline.ROLLED_OUT,
        "cert-manager's certificate",
    )
    first = kube.until(lambda: all_serve(built, system), Deadline.ROLLED_OUT, "its certificate to be served")
    secret = system.get("secret", SECRET)
    assert secret is not None
    assert secret["metadata"]["annotations"]["cert-manager.io/certificate-name"] == "pillion"
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: kube.all("checkpoints"), Deadline.TRAINED, "a checkpoint")
    authority, before = data(system, "ca.crt"), {pod["metadata"]["uid"] for pod in webhooks(system)}

    renew(system)

    def renewed() -> bool:
        assert admitted(kube)
        return all_serve(built, system) != first

    kube.until(renewed, Deadline.ROLLED_OUT, "the renewed certificate to be served")
    assert admitted(kube)
    assert data(system, "ca.crt") == authority, "sidecars that run trust what they got when their pods were made"
    assert {pod["metadata"]["uid"] for pod in webhooks(system)} == before, "no pod was started again for it"
    newest = kube.newest_checkpoint()
    kube.until(lambda: kube.newest_checkpoint() > newest, Deadline.HOME, "reports after the renewal")
