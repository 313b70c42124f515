"""
The story: certificates are renewed while pods are admitted, and nobody notices.

Called from: pytest.
"""

import functools
import json
import threading

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Kube, KubectlFailed
from support.release import Release


def _serial(kube: Kube) -> str:
    secret = kube.get("secret", "pillion-tls")
    assert secret is not None
    return str(secret["data"]["tls.crt"])


def test_a_rotation_of_the_authority_refuses_no_admission_and_no_report(training: Training, release: Release) -> None:
    """The Secret is deleted while pods are created in a loop: all are injected, and a running job goes on reporting."""
    kube, system = training.kube, release.kube
    training.run(jobs.policy(), *jobs.job(env={"STEPS": "100000"}))
    kube.until(lambda: kube.all("checkpoints"), Deadline.TRAINED, "a checkpoint")
    before = _serial(system)
    stop = threading.Event()
    refusals: list[str] = []
    admitted: list[str] = []
    pod = json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "generateName": "probe-",
                "annotations": {"pillion.dev/policy": "llm", "pillion.dev/job-id": "probe"},
            },
            "spec": {"containers": [{"name": "main", "image": jobs.IMAGE}]},
        }
    )

    def create() -> None:
        while not stop.is_set():
            try:
                shown = json.loads(kube.run("create", "--dry-run=server", "-o", "json", "-f", "-", given=pod))
                admitted.append(shown["spec"]["initContainers"][0]["name"])
            except (KubectlFailed, KeyError) as err:
                refusals.append(str(err))

    thread = threading.Thread(target=create)
    thread.start()
    try:
        for _ in range(2):
            last = _serial(system)
            system.delete("secret", "pillion-tls")
            kube.until(functools.partial(_renewed, system, last), Deadline.ROLLED_OUT, "a new certificate")
            wanted = len(admitted) + 20
            kube.until(functools.partial(_more_than, admitted, wanted), Deadline.ROLLED_OUT, "admissions after it")
    finally:
        stop.set()
        thread.join()
    assert refusals == []
    assert set(admitted) == {"pillion-sidecar"}
    assert _serial(system) != before
    newest = kube.newest_checkpoint()
    kube.until(
        lambda: kube.newest_checkpoint() > newest,
        Deadline.HOME,
        "reports after the rotation",
    )


def _more_than(admitted: list[str], count: int) -> bool:
    return len(admitted) > count


def _renewed(system: Kube, last: str) -> bool:
    secret = system.get("secret", "pillion-tls")
    return secret is not None and secret["data"].get("tls.crt") not in (None, "", last)
