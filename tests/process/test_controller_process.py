"""
The whole of: the life of a controller process: it waits for the Lease, leads, hands over, and ends at once when it may not lead.

Called from: pytest. The API server is a fake; tests/cluster has a real one.
"""

import contextlib
import functools
import http.client
import json
import signal
import ssl
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support import reports
from support.deadlines import Deadline, eventually
from support.fake_api import FakeApi
from support.processes import Processes, Run

NAMESPACE: Final = "pillion-system"
SLICES: Final = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
LEASES: Final = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
LEASE_LOST: Final = 75
NUM_FORGED: Final = 300
"""Tokens; more than the looks at unknown pods that may come at once, and those of the seconds that the test takes."""
UNAVAILABLE: Final = 69


@pytest.fixture
def server() -> Iterator[FakeApi]:
    """An API server with a slice: this fake does not make one when it is patched."""
    with FakeApi() as found:
        found.put(f"{SLICES}/pillion-home", {"metadata": {"name": "pillion-home", "namespace": NAMESPACE}})
        yield found


def start(processes: Processes, kubeconfig: Path, name: str, address: str) -> Run:
    environment = {
        "KUBECONFIG": str(kubeconfig),
        "KUBERNETES_SERVICE_HOST": "",
        "PILLION_NAMESPACE": NAMESPACE,
        "PILLION_POD_NAME": name,
        "PILLION_POD_IP": address,
        "PILLION_LISTEN_ADDRESS": "127.0.0.1",
        "PILLION_HEALTH_PORT": "0",
        "PILLION_HOME_LISTEN_PORT": "0",
    }
    return processes.python("-m", "pillion_operator", "controller", env=environment)


def addresses(server: FakeApi) -> list[str]:
    (found,) = server.find(SLICES)
    return [address for each in found.get("endpoints") or [] for address in each["addresses"]]


def holder(server: FakeApi) -> str:
    return "".join(each["spec"]["holderIdentity"] for each in server.find(LEASES))


def said(run: Run, part: str) -> dict[str, Any]:
    """The line of the log that has these words."""
    lines = [json.loads(line) for line in run.stderr.splitlines() if line.startswith("{") and line.endswith("}")]
    return next((line for line in lines if part in line["message"]), {})


def status(run: Run, path: str) -> int:
    port = said(run, "serving health")["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=Deadline.REPLY.s) as answer:
        return int(answer.status)


def is_ready(run: Run) -> bool:
    return status(run, "/readyz") == 200


def test_one_leads_and_another_takes_over_when_it_is_told_to_end(
    processes: Processes, server: FakeApi, tmp_path: Path
) -> None:
    """The leader's address is there while it leads; it takes it away, gives the Lease up, and the next is there in seconds."""
    kubeconfig = server.kubeconfig(tmp_path)
    first = start(processes, kubeconfig, "first", "192.0.2.1")
    eventually(lambda: addresses(server) == ["192.0.2.1"], Deadline.PROCESS_START, "the first to lead")
    second = start(processes, kubeconfig, "second", "192.0.2.2")
    eventually(lambda: said(second, "serving health"), Deadline.PROCESS_START, "the second to wait")
    assert holder(server) == "first"
    for run in (first, second):
        eventually(functools.partial(is_ready, run), Deadline.REPLY, "readiness")
        assert status(run, "/healthz") == 200
        assert status(run, "/metrics") == 200
    first.signal(signal.SIGTERM)
    assert first.wait(Deadline.PROCESS_EXIT) == 0
    eventually(lambda: addresses(server) == ["192.0.2.2"], Deadline.REPLY, "the second to lead")
    assert holder(server) == "second"
    second.signal(signal.SIGTERM)
    assert second.wait(Deadline.PROCESS_EXIT) == 0
    assert (addresses(server), holder(server)) == ([], "")


def test_forged_tokens_cost_the_api_server_next_to_nothing(
    processes: Processes, server: FakeApi, tmp_path: Path
) -> None:
    """Hundreds of tokens that name pods which there are not: none is asked about, few pods are looked for, and all are refused."""
    run = start(processes, server.kubeconfig(tmp_path), "first", "192.0.2.1")
    eventually(lambda: addresses(server) == ["192.0.2.1"], Deadline.PROCESS_START, "it to lead")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = said(run, "serving reports of sidecars")["port"]
    statuses = Counter[int]()
    with contextlib.closing(
        http.client.HTTPSConnection("127.0.0.1", port, timeout=Deadline.REPLY.s, context=context)
    ) as stranger:
        for number in range(NUM_FORGED):
            token = reports.token(end_s=time.time() + 3600, uid=str(number))
            stranger.request("POST", "/v1/report", b"{}", {"Authorization": f"Bearer {token}"})
            answer = stranger.getresponse()
            answer.read()
            statuses[answer.status] += 1
    assert statuses.keys() == {403, 503}, statuses
    assert server.count("create", "/apis/authentication.k8s.io/v1/tokenreviews") == 0
    looked = server.count("get", f"/api/v1/namespaces/{reports.NAMESPACE}/pods/{reports.JOB}-0")
    assert looked == statuses[403] < NUM_FORGED / 2


def test_a_leader_whose_lease_another_holds_ends_at_once(processes: Processes, server: FakeApi, tmp_path: Path) -> None:
    """With a status that is not 0, and without touching what is the other's by now."""
    run = start(processes, server.kubeconfig(tmp_path), "first", "192.0.2.1")
    eventually(lambda: addresses(server) == ["192.0.2.1"], Deadline.PROCESS_START, "it to lead")
    (lease,) = server.find(LEASES)
    stolen = lease | {"spec": lease["spec"] | {"holderIdentity": "other"}}
    server.put(f"{LEASES}/pillion-controller", stolen)
    assert run.wait(Deadline.PROCESS_EXIT) == LEASE_LOST
    assert addresses(server) == ["192.0.2.1"], "the other writes its own"
    assert holder(server) == "other"


def test_without_an_api_server_it_says_so_and_ends(processes: Processes, tmp_path: Path) -> None:
    """There is nothing that it could do."""
    run = start(processes, tmp_path / "none", "first", "192.0.2.1")
    assert run.wait(Deadline.PROCESS_START) == UNAVAILABLE
    assert said(run, "cannot start")
