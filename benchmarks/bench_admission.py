"""
The webhook alone: what one review costs its process, over kept connections and over new ones, at a pace as an API server asks.

    python benchmarks/bench_admission.py [--rate 100] [--reviews 2000] [--profile FILE]

Called from: people. The webhook is the product's own process with TLS, its API server a fake one with a policy; the reviews are those of a job's pods. Each
review has its moment, whether or not the one before is answered, so that a wait shows as a wait. `--profile` runs the webhook under cProfile.
Must never: take what the client spends for the webhook's: the time from the connection to the answer is counted apart from the handshake.
"""

import argparse
import asyncio
import base64
import datetime
import json
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any, Final

from pillion_operator.certificates import issue
from support.fake_api import FakeApi

HOST: Final = "127.0.0.1"
NAMESPACE: Final = "pillion-system"
BODY: Final[dict[str, Any]] = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
STARTED_S: Final = 30.0
"""For the webhook to be ready."""
POLL_S: Final = 0.05
"""Between two looks at whether it is ready; STARTED_S bounds them all."""
MAX_IDLE: Final = 25
"""Connections that are kept without a request, as client-go keeps them for each host."""


@dataclass(slots=True)
class Times:
    """What the reviews of one run took, in seconds."""

    handshake: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)
    """From the request's first byte to the answer's last."""
    whole: list[float] = field(default_factory=list)
    """From its moment to the answer."""


def pod(number: int) -> dict[str, Any]:
    """A pod of a job as the API server sends it, some 6 KiB."""
    env = [{"name": f"VARIABLE_{index}", "value": "x" * 60} for index in range(40)]
    fields = [
        {
            "manager": "kube-controller-manager",
            "operation": "Update",
            "fieldsV1": {f"f:{index}": {} for index in range(100)},
        }
    ]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "train", "uid": "1", "controller": True}
    return {
        "metadata": {
            "generateName": "train-",
            "labels": {"batch.kubernetes.io/job-completion-index": str(number)},
            "annotations": {"pillion.dev/policy": "llm"},
            "ownerReferences": [owner],
            "managedFields": fields,
        },
        "spec": {
            "containers": [
                {
                    "name": "trainer",
                    "image": "example/train:1",
                    "env": env,
                    "resources": {"limits": {"nvidia.com/gpu": "8", "cpu": "32", "memory": "512Gi"}},
                }
            ]
        },
    }


def request(number: int) -> bytes:
    """One review, with its head."""
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    asked = {"uid": str(number), "kind": kind, "operation": "CREATE", "namespace": "team", "object": pod(number)}
    body = json.dumps(BODY | {"request": asked}).encode()
    head = f"POST /mutate?timeout=5s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(connection: Connection, data: bytes) -> None:
    reader, writer = connection
    writer.write(data)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    body = await reader.readexactly(length)
    if " 200 " not in head.splitlines()[0] or b'"patch"' not in body:
        raise RuntimeError(f"not injected: {head[:80]} {body[:200]!r}")


async def drive(port: int, context: ssl.SSLContext, *, rate: float, reviews: int, keep: bool) -> Times:
    """So many reviews at a pace."""
    found, idle = Times(), list[Connection]()
    begun_s = time.perf_counter() + 0.1

    async def one(number: int, data: bytes) -> None:
        moment_s = begun_s + number / rate
        await asyncio.sleep(moment_s - time.perf_counter())
        if idle:
            connection = idle.pop()
        else:
            handshake_s = time.perf_counter()
            connection = await asyncio.open_connection(HOST, port, ssl=context)
            found.handshake.append(time.perf_counter() - handshake_s)
        asked_s = time.perf_counter()
        await ask(connection, data)
        now_s = time.perf_counter()
        found.answer.append(now_s - asked_s)
        found.whole.append(now_s - moment_s)
        if keep and len(idle) < MAX_IDLE:
            idle.append(connection)
        else:
            connection[1].close()

    await asyncio.gather(*(one(number, request(number)) for number in range(reviews)))
    for _, writer in idle:
        writer.close()
    return found


def line(what: str, samples: Sequence[float]) -> str:
    if len(samples) < 2:
        return f"{what:<44} none"
    cuts = statistics.quantiles(samples, n=100)
    return f"{what:<44} p50 {cuts[49] * 1e3:7.2f} ms   p99 {cuts[98] * 1e3:7.2f} ms   n {len(samples)}"


def own(port: int) -> tuple[float, float, float]:
    """By the webhook: seconds of its processor, seconds between a whole request and its answer, and their number."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values = {
        name: float(value) for name, _, value in (each.rpartition(" ") for each in text.splitlines()) if name[:1] != "#"
    }
    prefix = "pillion_admission_duration_seconds"
    return values["process_cpu_seconds_total"], values[f"{prefix}_sum"], values[f"{prefix}_count"]


def measure(options: argparse.Namespace) -> None:
    authority = issue.make_authority(datetime.datetime.now(UTC))
    leaf = issue.make_leaf(authority, [HOST], datetime.datetime.now(UTC))
    content = {"tls.crt": leaf.chain, "tls.key": leaf.key, "ca.crt": authority.certificate}
    spec = {
        "trigger": {"periodSteps": 10},
        "staging": {"sizeLimit": "96Gi"},
        "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
    }
    with FakeApi() as api, tempfile.TemporaryDirectory() as folder:
        data = {name: base64.b64encode(text.encode()).decode() for name, text in content.items()}
        api.put(f"/api/v1/namespaces/{NAMESPACE}/secrets/pillion-tls", {"data": data})
        document = {"apiVersion": "pillion.dev/v1alpha1", "kind": "CheckpointPolicy", "spec": spec}
        api.put("/apis/pillion.dev/v1alpha1/namespaces/team/checkpointpolicies/llm", document)
        environ = {
            "PATH": "/usr/bin:/bin",
            "KUBECONFIG": str(api.kubeconfig(Path(folder))),
            "PILLION_NAMESPACE": NAMESPACE,
            "PILLION_LISTEN_ADDRESS": HOST,
            "PILLION_WEBHOOK_LISTEN_PORT": "0",
            "PILLION_HEALTH_PORT": "0",
            "PILLION_SHUTDOWN_GRACE_S": "0",
            "PILLION_HOME_URL": "https://pillion-home.pillion-system.svc",
        }
        profiled = ["-m", "cProfile", "-o", options.profile] if options.profile else []
        command = [sys.executable, *profiled, "-m", "pillion_operator", "webhook"]
        log = Path(folder) / "log"
        with log.open("wb") as file, subprocess.Popen(command, env=environ, stderr=file) as webhook:
            try:
                port, health = await_ready(log)
                context = ssl.create_default_context(cadata=authority.certificate)
                asyncio.run(drive(port, context, rate=options.rate, reviews=100, keep=True))
                for keep in (True, False):
                    before = own(health)
                    times = asyncio.run(drive(port, context, rate=options.rate, reviews=options.reviews, keep=keep))
                    after = own(health)
                    num = after[2] - before[2]
                    kind = "kept connections" if keep else "a new connection each"
                    print(line(f"{kind}: from its moment to the answer", times.whole))
                    print(line(f"{kind}: handshake", times.handshake))
                    print(line(f"{kind}: request to answer", times.answer))
                    print(
                        f"{kind}: the webhook's own time {(after[1] - before[1]) / num * 1e3:.2f} ms, its processor {(after[0] - before[0]) / num * 1e3:.2f} ms a review"
                    )
            finally:
                webhook.terminate()


def await_ready(log: Path) -> tuple[int, int]:
    """Ports of admission and health. Blocks: until both are served."""
    until_s = time.monotonic() + STARTED_S
    while time.monotonic() < until_s:
        said = {
            each["message"]: each
            for each in map(json.loads, (line for line in log.read_text().splitlines() if line.endswith("}")))
        }
        if "serving admission" in said and "serving health and metrics" in said:
            health = int(said["serving health and metrics"]["port"])
            try:
                with urllib.request.urlopen(f"http://{HOST}:{health}/readyz", timeout=5):
                    return int(said["serving admission"]["port"]), health
            except OSError:
                # 503: not ready yet.
                pass
        time.sleep(POLL_S)
    raise TimeoutError(f"the webhook is not ready after {STARTED_S:.0f} s: {log.read_text()[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0, help="reviews a second")
    parser.add_argument("--reviews", type=int, default=2000)
    parser.add_argument("--profile", default="", help="a file for cProfile's numbers of the webhook")
    measure(parser.parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())
