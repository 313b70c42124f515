"""
The story: nobody reports for somebody else.

Called from: pytest. Requests go from inside a pod, as an attacker's would.
"""

import json

from cluster.conftest import Training
from support import jobs
from support.deadlines import Deadline
from support.kube import Json, Kube

ASK = """
import json, os, ssl, sys, urllib.error, urllib.request
given = json.load(sys.stdin)
context = ssl.create_default_context(cadata=given["ca"])
request = urllib.request.Request(given["url"] + "/v1/report", json.dumps(given["report"]).encode(), method="POST")
request.add_header("Authorization", "Bearer " + given["token"])
request.add_header("Content-Type", "application/json")
try:
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as err:
    print(err.code, err.read().decode())
"""


def ask(kube: Kube, pod: str, token: str, report: Json, home: Json) -> tuple[int, str]:
    """POST a report from a pod's trainer container; status and text."""
    given = json.dumps({"token": token, "report": report} | home)
    text = kube.run("exec", "-i", pod, "-c", jobs.CONTAINER, "--", jobs.PYTHON, "-c", ASK, given=given)
    status, _, body = text.partition(" ")
    return int(status), body.strip()


def test_a_token_that_is_not_this_pods_is_refused(training: Training) -> None:
    """Another audience, another pod and another job are refused with the reason; the pod's own token is taken."""
    kube = training.kube
    training.run(jobs.policy(), *jobs.job("one", env={"STEPS": "100000"}), *jobs.job("two", env={"STEPS": "100000"}))
    kube.until(
        lambda: {each["spec"]["jobID"] for each in kube.all("checkpoints")} == {"one", "two"}, Deadline.TRAINED, "both"
    )
    (one,), (two,) = kube.pods("one"), kube.pods("two")
    name = one["metadata"]["name"]
    sidecar = next(each for each in one["spec"]["initContainers"] if each["name"] == "pillion-sidecar")
    env = {each["name"]: each.get("value", "") for each in sidecar["env"]}
    home = {"url": env["PILLION_HOME_URL"], "ca": env["PILLION_HOME_CA"]}
    report: Json = {
        "version": 1,
        "namespace": kube.namespace,
        "pod": name,
        "pod_uid": one["metadata"]["uid"],
        "policy": "llm",
        "job_kind": "Job",
        "job_name": "one",
        "job_id": "one",
    }
    own = kube.exec(name, "pillion-sidecar", "cat", "/pillion/token/token")
    status, text = ask(kube, name, own, report, home)
    assert (status, "interval_s" in text) == (200, True), text

    def minted(*options: str) -> str:
        return kube.run("create", "token", "default", *options).strip()

    bound = ("--bound-object-kind=Pod", f"--bound-object-name={name}")
    cases = {
        "nonsense": ("no.token.atall", report, 401),
        "another audience": (minted(*bound, "--audience=somebody-else"), report, 401),
        "no audience": (minted(*bound), report, 401),
        "no pod": (minted("--audience=pillion.dev"), report, 403),
        "another pod's report": (
            own,
            report | {"pod": two["metadata"]["name"], "pod_uid": two["metadata"]["uid"]},
            403,
        ),
        "another job's report": (own, report | {"job_id": "two", "job_name": "two"}, 403),
        "another namespace's report": (own, report | {"namespace": "kube-system"}, 403),
    }
    for case, (token, said, wanted) in cases.items():
        status, text = ask(kube, name, token, said, home)
        assert status == wanted, (case, status, text)
        assert text, case
