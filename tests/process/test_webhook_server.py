"""
The whole of: the webhook as the API server meets it: a process with TLS, a certificate that changes, and a cluster that is not always there.

Called from: pytest. The API server behind it is the fake, which passes the real one's suite (test_fake_api.py).
"""

import base64
import contextlib
import datetime
import http.client
import json
import resource
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from pathlib import Path
from signal import SIGTERM
from typing import Any, Final

import pytest

from pillion_operator.certificates import issue
from pillion_operator.webhook import server as webhook_server
from support import json_patch
from support.deadlines import Deadline, eventually
from support.fake_api import FakeApi
from support.processes import Processes, Run

Json = dict[str, Any]
HOST: Final = "127.0.0.1"
NAMESPACE: Final = "pillion-system"
SECRET: Final = f"/api/v1/namespaces/{NAMESPACE}/secrets/pillion-tls"
POLICIES: Final = "/apis/pillion.dev/v1alpha1/namespaces/team-a/checkpointpolicies"
EVENTS: Final = "/apis/events.k8s.io/v1/namespaces/team-a/events"
JOB: Final = "/apis/batch/v1/namespaces/team-a/jobs/train"
POD: Final[Json] = {
    "metadata": {
        "generateName": "train-",
        "annotations": {"pillion.dev/policy": "llm"},
        "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": "train", "uid": "1", "controller": True}],
    },
    "spec": {"containers": [{"name": "trainer", "image": "example/train:1"}]},
}
MOST_HELD_MIB: Final = 70.0
"""What bodies of 4 MiB in all, their TLS and the allocator may take; before there was a bound, the test's 40 bodies took 120, and any number took its own."""
UNHEARD_OF: Final = POD | {"spec": {"containers": 5}}
"""What no API server sends, and injection is not made for."""
NOW: Final = datetime.datetime.now(UTC)
AUTHORITY: Final = issue.make_authority(NOW)


def policy(**spec: Any) -> Json:
    storage = {"persistentVolumeClaim": {"claimName": "checkpoints"}}
    whole = {"trigger": {"periodSteps": 10}, "staging": {"sizeLimit": "1Gi"}, "storage": storage} | spec
    return {"apiVersion": "pillion.dev/v1alpha1", "kind": "CheckpointPolicy", "spec": whole}


def secret() -> Json:
    """A certificate that was not there before."""
    leaf = issue.make_leaf(AUTHORITY, [HOST], NOW)
    content = {"tls.crt": leaf.chain, "tls.key": leaf.key, "ca.crt": AUTHORITY.certificate}
    return {"data": {name: base64.b64encode(text.encode()).decode() for name, text in content.items()}}


class Webhook:
    """A webhook process, and what can be asked of it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.port = self._said("serving admission")
        self.health_port = self._said("serving health and metrics")

    def _said(self, message: str) -> int:
        def port() -> int:
            assert self.run.popen.poll() is None, self.run.tail()
            lines = [json.loads(line) for line in self.run.stderr.splitlines() if line.endswith("}")]
            return next((int(line["port"]) for line in lines if line["message"] == message), 0)

        return eventually(port, Deadline.PROCESS_START, f"the webhook to say that it {message}")

    def health(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.health_port, timeout=Deadline.REPLY.s)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def ready(self) -> "Webhook":
        """Blocks: until it says that it is ready."""
        eventually(lambda: self.health("/readyz")[0] == 200, Deadline.REPLY, "the webhook to be ready")
        return self

    def connect(self) -> http.client.HTTPSConnection:
        """As the API server does: the authority is trusted, the name is checked."""
        context = ssl.create_default_context(cadata=AUTHORITY.certificate)
        return http.client.HTTPSConnection(HOST, self.port, timeout=Deadline.REPLY.s, context=context)

    def admit(self, pod: Json, connection: http.client.HTTPSConnection | None = None, **request: Any) -> Json:
        """The response about a pod."""
        own = connection or self.connect()
        try:
            status, body, _ = ask(own, json.dumps(review(pod, **request)).encode())
            assert status == 200, body
            response: Json = json.loads(body)["response"]
            return response
        finally:
            if connection is None:
                own.close()


def review(pod: Json, **request: Any) -> Json:
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    asked = {"uid": "42", "kind": kind, "operation": "CREATE", "namespace": "team-a", "object": pod} | request
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked}


def ask(connection: http.client.HTTPSConnection, body: bytes) -> tuple[int, bytes, str]:
    """Status, body, and what is to become of the connection."""
    connection.request("POST", "/mutate?timeout=5s", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.getheader("Connection", "")


@pytest.fixture
def cluster() -> Iterator[FakeApi]:
    """An API server with a certificate and a policy."""
    with FakeApi() as found:
        found.put(SECRET, secret())
        found.put(f"{POLICIES}/llm", policy())
        uid = found.put(JOB, {"apiVersion": "batch/v1", "kind": "Job"})["metadata"]["uid"]
        POD["metadata"]["ownerReferences"][0]["uid"] = uid
        yield found


@pytest.fixture
def environ(cluster: FakeApi, processes: Processes, tmp_path: Path) -> Iterator[dict[str, str]]:
    """For a webhook before that cluster, which it does not outlive."""
    yield {
        "KUBECONFIG": str(cluster.kubeconfig(tmp_path)),
        "KUBERNETES_SERVICE_HOST": "",
        "PILLION_NAMESPACE": NAMESPACE,
        "PILLION_LISTEN_ADDRESS": HOST,
        "PILLION_WEBHOOK_LISTEN_PORT": "0",
        "PILLION_HEALTH_PORT": "0",
        "PILLION_HOME_URL": "https://pillion-home.pillion-system.svc",
        "PILLION_SHUTDOWN_GRACE_S": "0",
    }
    processes.reap()


@pytest.fixture
def webhook(processes: Processes, environ: dict[str, str]) -> Webhook:
    return Webhook(processes.python("-m", "pillion_operator", "webhook", env=environ)).ready()


def test_it_is_ready_with_a_certificate_and_the_policies(
    cluster: FakeApi, processes: Processes, environ: dict[str, str]
) -> None:
    """Until both are there it says what is missing, and refuses handshakes instead of answering with what it does not know."""
    cluster.remove(SECRET)
    cluster.refuse(503)
    webhook = Webhook(processes.python("-m", "pillion_operator", "webhook", env=environ))
    assert webhook.health("/healthz")[0] == 200
    assert webhook.health("/readyz") == (503, "no certificate yet\nthe policies are not listed yet\n")
    with pytest.raises(ssl.SSLError):
        webhook.admit(POD)
    cluster.refuse(0)
    eventually(lambda: webhook.health("/readyz")[1] == "no certificate yet\n", Deadline.API, "the policies")
    cluster.put(SECRET, secret())
    webhook.ready()
    assert webhook.admit(POD)["allowed"] is True
    status, text = webhook.health("/metrics")
    assert status == 200
    assert 'pillion_admission_requests_total{decision="inject",reason="Injected"} 1.0' in text


def test_a_pod_is_injected_with_the_authority_to_call_home_to(webhook: Webhook, cluster: FakeApi) -> None:
    """The patch makes an injected pod, which trusts the certificate's authority, as it is now."""
    response = webhook.admit(POD)
    assert response["allowed"] is True
    pod = json_patch.apply(POD, json.loads(base64.b64decode(response["patch"])))
    sidecar = next(each for each in pod["spec"]["initContainers"] if each["name"] == "pillion-sidecar")
    env = {each["name"]: each.get("value") for each in sidecar["env"]}
    assert env["PILLION_HOME_CA"] == AUTHORITY.certificate
    assert cluster.count("get") == 0, "nothing is asked about what is in the cache"
    assert cluster.find(EVENTS) == [], "the controller says it, when the pod is there"


def test_a_certificate_changes_without_a_refused_connection(webhook: Webhook, cluster: FakeApi) -> None:
    """Under load, on new connections and on old ones, no handshake and no request fails while certificates change."""
    stop = threading.Event()
    failures: list[str] = []
    answered = [0] * 4

    def load(index: int) -> None:
        kept = webhook.connect() if index % 2 else None
        try:
            while not stop.is_set():
                try:
                    assert webhook.admit(POD, kept)["allowed"] is True
                    answered[index] += 1
                except (OSError, http.client.HTTPException, AssertionError) as err:
                    failures.append(repr(err))
                    return
        finally:
            if kept is not None:
                kept.close()

    threads = [threading.Thread(target=load, args=(index,)) for index in range(len(answered))]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            served, before = secret(), list(answered)
            cluster.put(SECRET, served)
            wanted = ssl.PEM_cert_to_DER_cert(base64.b64decode(served["data"]["tls.crt"]).decode())
            eventually(lambda wanted=wanted: shown(webhook) == wanted, Deadline.REPLY, "the new certificate")  # type: ignore[misc]
            eventually(
                lambda before=before: failures or all(now > then for now, then in zip(answered, before, strict=True)),  # type: ignore[misc]
                Deadline.REPLY,
                "every client to be answered",
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    cluster.put(SECRET, {"data": {"tls.crt": "", "tls.key": ""}})
    cluster.remove(SECRET)
    assert webhook.admit(POD)["allowed"] is True
    assert webhook.health("/readyz")[0] == 200


def test_a_claim_for_one_node_is_a_warning_for_several_pods(webhook: Webhook, cluster: FakeApi) -> None:
    """What the controller has read of the policy's claim reaches the pods of a training; a claim of another name says nothing."""
    gang = {"labels": {"kueue.x-k8s.io/pod-group-name": "gang"}}
    notes = POD["metadata"]["annotations"] | {"kueue.x-k8s.io/pod-group-total-count": "2"}
    pod = POD | {"metadata": {"name": "gang-0", "annotations": notes} | gang}

    def is_warned() -> bool:
        return any("the claim checkpoints is ReadWriteOnce" in each for each in webhook.admit(pod).get("warnings", []))

    def read(claim: str) -> None:
        status = {"claim": {"name": claim, "accessModes": ["ReadWriteOnce"]}}
        cluster.put(f"{POLICIES}/llm", policy() | {"status": status})

    assert not is_warned()
    read("checkpoints")
    eventually(is_warned, Deadline.API, "the warning")
    read("another")
    eventually(lambda: not is_warned(), Deadline.API, "no warning of a claim that the policy no longer names")


def shown(webhook: Webhook) -> bytes | None:
    """The certificate that a new connection is shown."""
    connection = webhook.connect()
    try:
        connection.connect()
        return connection.sock.getpeercert(binary_form=True) if isinstance(connection.sock, ssl.SSLSocket) else None
    finally:
        connection.close()


def test_a_policy_that_was_just_made_is_found(webhook: Webhook, cluster: FakeApi) -> None:
    """A policy that the watch has not told of yet is asked for, so that no pod of a new job is refused for it."""
    cluster.be_silent()
    cluster.put(f"{POLICIES}/llm2", policy())
    pod = POD | {"metadata": {"name": "a", "annotations": {"pillion.dev/policy": "llm2"}}}
    assert webhook.admit(pod)["allowed"] is True
    assert cluster.count("get", f"{POLICIES}/llm2") == 1


def test_a_missing_policy_is_asked_about_once(webhook: Webhook, cluster: FakeApi) -> None:
    """A hundred pods that name a policy which is not there cost one question, and each is told what is missing."""
    pod = POD | {"metadata": POD["metadata"] | {"annotations": {"pillion.dev/policy": "absent"}}}
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: webhook.admit(pod), range(100)))
    assert not any(each["allowed"] for each in responses)
    assert {each["status"]["message"] for each in responses} == {responses[0]["status"]["message"]}
    assert "PolicyMissing" in responses[0]["status"]["message"]
    assert cluster.count("get") <= 3, "one a second"


def test_a_cluster_that_is_away_changes_nothing_about_known_policies(webhook: Webhook, cluster: FakeApi) -> None:
    """With the API server down, pods of known policies are injected; of an unknown one nobody can say, and the setting decides."""
    cluster.stop()
    try:
        assert webhook.admit(POD)["allowed"] is True
        pod = POD | {"metadata": {"generateName": "a-", "annotations": {"pillion.dev/policy": "unknown"}}}
        response = webhook.admit(pod)
        assert response["allowed"] is False
        assert "InternalError" in response["status"]["message"]
        assert "policy unknown could not be looked up" in response["status"]["message"]
        assert webhook.health("/readyz")[0] == 200
    finally:
        cluster.start()


@pytest.mark.parametrize("failure_policy", ["Fail", "Ignore"])
def test_an_error_of_ours_is_the_policys_to_judge(webhook: Webhook, cluster: FakeApi, failure_policy: str) -> None:
    """What injection fails on is refused or admitted untouched, as the policy says; event, metric and log have the reason."""
    cluster.put(f"{POLICIES}/judge", policy(failurePolicy=failure_policy))
    pod = UNHEARD_OF | {"metadata": POD["metadata"] | {"annotations": {"pillion.dev/policy": "judge"}}}
    response = webhook.admit(pod)
    assert response["allowed"] is (failure_policy == "Ignore")
    assert "patch" not in response
    assert "InternalError" in json.dumps(response)
    assert "traceback" in webhook.run.stderr
    assert 'reason="InternalError"' in webhook.health("/metrics")[1]
    event = eventually(lambda: cluster.find(EVENTS), Deadline.API, "an event")[0]
    assert (event["regarding"]["name"], event["reason"], event["type"]) == ("train", "InternalError", "Warning")
    assert webhook.admit(POD)["allowed"] is True


def test_a_dry_run_leaves_nothing_behind(webhook: Webhook, cluster: FakeApi) -> None:
    """A dry run is answered like any other, and nobody is told of it."""
    pod = POD | {"metadata": POD["metadata"] | {"annotations": {"pillion.dev/policy": "absent"}}}
    assert "PolicyMissing" in json.dumps(webhook.admit(pod, dryRun=True))
    assert "PolicyMissing" in json.dumps(webhook.admit(pod))
    events = eventually(lambda: cluster.find(EVENTS), Deadline.API, "the event of the other one")
    assert [event.get("series", {}).get("count", 1) for event in events] == [1]


def test_what_is_no_review_is_refused_and_forgotten(webhook: Webhook) -> None:
    """Garbage gets a status of its own, what is too long is not read, and the next pod is served."""
    connection = webhook.connect()
    try:
        assert ask(connection, b"{}")[0] == 400
        assert webhook.admit(POD, connection)["allowed"] is True
    finally:
        connection.close()
    connection = webhook.connect()
    # An error: the answer came before the body had been sent.
    with contextlib.suppress(OSError), contextlib.closing(connection):
        assert ask(connection, b" " * (webhook_server.MAX_BODY_BYTES + 1))[0] == 413
    assert webhook.admit(POD)["allowed"] is True


def test_a_stranger_costs_a_bounded_amount_and_leaves_nothing_behind(webhook: Webhook, cluster: FakeApi) -> None:
    """Slow bodies, silent connections and made-up reviews: memory is bounded, no Event is written, and the API server is answered."""
    before = resident_mib(webhook)
    slow = []
    try:
        for number in range(40):
            connection = webhook.connect()
            slow.append(connection)
            connection.putrequest("POST", "/mutate")
            connection.putheader("Content-Length", str(webhook_server.MAX_BODY_BYTES))
            connection.endheaders()
            # An error: it had to make room.
            with contextlib.suppress(OSError):
                connection.send(b"x" * (webhook_server.MAX_BODY_BYTES - 1))
            if number % 8 == 0:
                assert webhook.admit(POD)["allowed"] is True
        held = resident_mib(webhook) - before
        assert held < MOST_HELD_MIB, f"40 bodies of 3 MiB took {held:.0f} MiB"
        metadata = POD["metadata"] | {"ownerReferences": [POD["metadata"]["ownerReferences"][0] | {"uid": "made-up"}]}
        text = "pillion.dev/CLUSTER COMPROMISED"
        forged = POD | {"metadata": metadata | {"annotations": {"pillion.dev/policy": "absent", text: "x"}}}
        assert webhook.admit(forged)["allowed"] is False
        real = POD | {"metadata": POD["metadata"] | {"annotations": {"pillion.dev/policy": "absent"}}}
        assert webhook.admit(real)["allowed"] is False
        events = eventually(lambda: cluster.find(EVENTS), Deadline.API, "the Event of the real one")
        assert [each["reason"] for each in events] == ["PolicyMissing"]
        assert text not in json.dumps(events)
    finally:
        for connection in slow:
            connection.close()


def resident_mib(webhook: Webhook) -> float:
    """Memory of the process."""
    pages = int(Path(f"/proc/{webhook.run.popen.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def test_it_goes_on_serving_while_the_cluster_learns_that_it_ends(
    cluster: FakeApi, processes: Processes, environ: dict[str, str]
) -> None:
    """After SIGTERM it is not ready at once, answers everyone during its grace and lets each connection end, and exits with 0."""
    environ["PILLION_SHUTDOWN_GRACE_S"] = "2"
    webhook = Webhook(processes.python("-m", "pillion_operator", "webhook", env=environ)).ready()
    kept = webhook.connect()
    try:
        assert webhook.admit(POD, kept)["allowed"] is True
        webhook.run.signal(SIGTERM)
        eventually(lambda: webhook.health("/readyz")[0] == 503, Deadline.REPLY, "it to be not ready")
        status, _, connection_header = ask(kept, json.dumps(review(POD)).encode())
        assert (status, connection_header) == (200, "close")
        refused = POD | {"metadata": POD["metadata"] | {"annotations": {"pillion.dev/policy": "absent"}}}
        assert webhook.admit(refused)["allowed"] is False
        assert webhook.health("/healthz")[0] == 200
    finally:
        kept.close()
    assert webhook.run.wait(Deadline.PROCESS_EXIT) == 0
    assert cluster.find(EVENTS), "what was said before the end is written"


@pytest.mark.parametrize(
    ("changed", "status", "text"),
    [
        ({"PILLION_NAMESPACE": "", "PILLION_WEBHOOK_LISTEN_PORT": "x"}, 78, "PILLION_WEBHOOK_LISTEN_PORT"),
        ({"KUBECONFIG": "/nowhere"}, 69, "no API server is configured"),
    ],
)
def test_it_does_not_begin_with_what_it_cannot_use(
    processes: Processes, environ: dict[str, str], changed: dict[str, str], status: int, text: str
) -> None:
    """Bad settings and a missing API server end it at once, each with its own status and in words."""
    run = processes.python("-m", "pillion_operator", "webhook", env=environ | changed)
    assert run.wait(Deadline.PROCESS_EXIT) == status
    assert text in run.stderr
