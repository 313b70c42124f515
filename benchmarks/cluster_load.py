"""
A crowd of injected pods on a real API server: fake nodes that kwok keeps, pods made at a rate or all at once, metrics before and after.

Called from: bench_cluster.py. Every pod here is made through admission, as any pod is; then nothing runs: kwok only says that it does.
Must never: touch a node, a pod or a namespace that it did not make, or have more requests in flight than it was told.
"""

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from cluster.harness import binaries
from cluster.harness.built import CONTROL, Built
from pillion_operator.cluster.client import ApiError, Client, Conflict, NotFound, Unreachable
from pillion_operator.injection import annotations
from support.kube import Kube, condition
from support.release import NAMESPACE

Json = dict[str, Any]

PODS_A_NODE: Final = 110
"""What a kubelet takes by default."""
MAX_MUTATING: Final = 200
"""
Requests in flight at most: the API server's own default of --max-mutating-requests-inflight. We are system:masters, which it exempts
from that limit and from priority and fairness, so we keep to it ourselves.
"""
FILLERS: Final = 16
"""Requests in flight while the crowd is made, which is not measured."""
REQUEST_S: Final = 30.0
"""For one request; the API server gives up on the webhook after 5 s."""
SETTLED_S: Final = 180.0
"""For what was made to be seen, and for what was removed to be gone."""
NODES_S: Final = 60.0
"""For kwok to start, and to say that the nodes are ready."""
POLL_S: Final = 1.0
STAGES: Final = Path(__file__).with_name("fake_nodes.yaml")
FAKE: Final = "kwok.x-k8s.io/node"
JOB_LABEL: Final = "training.kubeflow.org/job-name"
"""A job's kind that no controller of the cluster knows: the pods are ours alone."""
WEBHOOK: Final = "inject.pillion.dev"
_SAMPLE: Final = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What became of one request for a pod."""

    seconds: float
    status: int
    """Of HTTP; 0: no answer."""
    pod: Json = field(repr=False)
    """As it was made; what was said instead, where it was not."""

    @property
    def is_injected(self) -> bool:
        return self.status == 201 and annotations.INJECTED in (self.pod["metadata"].get("labels") or {})


class Sender:
    """
    Requests for pods, straight to the API server, each with its time.

    Owns: its connections.
    """

    def __init__(self, session: aiohttp.ClientSession, server: str) -> None:
        self._session = session
        self._server = server

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, client: Client) -> AsyncIterator["Sender"]:
        """To the API server of that client, as the same user."""
        found = await client.connection()
        context = ssl.create_default_context(cafile=found.authority)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if found.certificate:
            context.load_cert_chain(found.certificate, found.key)
        bound = aiohttp.ClientTimeout(total=REQUEST_S)
        connector = aiohttp.TCPConnector(limit=MAX_MUTATING, ssl=context)
        async with aiohttp.ClientSession(connector=connector, timeout=bound, trust_env=False) as session:
            yield cls(session, found.server)

    async def text(self, path: str) -> str:
        """What is at a path, which is no JSON."""
        async with self._session.get(self._server + path) as response:
            response.raise_for_status()
            return await response.text()

    async def make(self, pod: Json) -> Made:
        """Ask for a pod. Its time is from here to the whole answer, a wait for a free connection included."""
        begun_s = time.perf_counter()
        url = f"{self._server}/api/v1/namespaces/{pod['metadata']['namespace']}/pods"
        try:
            async with self._session.post(url, json=pod) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as err:
            return Made(
                seconds=time.perf_counter() - begun_s, status=0, pod={"message": f"{type(err).__name__}: {err}"}
            )
        return Made(seconds=time.perf_counter() - begun_s, status=response.status, pod=json.loads(body))

    async def make_all(self, pods: Iterable[Json], in_flight: int) -> list[Made]:
        """Ask for pods, as fast as so many requests at a time go."""
        waiting, made = iter(pods), list[Made]()

        async def one_after_the_other() -> None:
            for pod in waiting:
                made.append(await self.make(pod))

        await asyncio.gather(*(one_after_the_other() for _ in range(in_flight)))
        return made

    async def make_at_rate(self, pods: Iterable[Json], rate: float) -> list[Made]:
        """Ask for so many pods a second, whether the ones before are answered or not."""
        begun_s = time.perf_counter()
        asked = []
        for number, pod in enumerate(pods):
            await asyncio.sleep(max(0.0, begun_s + number / rate - time.perf_counter()))
            asked.append(asyncio.create_task(self.make(pod)))
        return list(await asyncio.gather(*asked))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """Metrics of one or several processes at one moment, summed."""

    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    @classmethod
    def of(cls, *texts: str) -> "Scrape":
        found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for text in texts:
            for line in text.splitlines():
                if match := _SAMPLE.match(line):
                    key = match["name"], tuple(sorted(_LABEL.findall(match["labels"] or "")))
                    found[key] = found.get(key, 0.0) + float(match["value"])
        return cls(samples=found)

    def total(self, name: str, /, **labels: str) -> float:
        """The sum of the series of that name that have these labels."""
        wanted = labels.items()
        return sum(value for (each, has), value in self.samples.items() if each == name and wanted <= dict(has).items())

    def since(self, before: "Scrape") -> "Scrape":
        """What was counted in between."""
        return Scrape(samples={key: value - before.samples.get(key, 0.0) for key, value in self.samples.items()})

    def buckets(self, name: str, /, **labels: str) -> list[tuple[float, float]]:
        """A histogram: upper edges and the number of those at or below, by edge."""
        found: dict[float, float] = {}
        for (each, has), value in self.samples.items():
            mine = dict(has)
            if each == f"{name}_bucket" and labels.items() <= mine.items():
                edge = float(mine["le"])
                found[edge] = found.get(edge, 0.0) + value
        return sorted(found.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line says."""

    pods: int
    jobs: int
    rate: int
    seconds: int
    burst: int
    plain: int
    steady: int
    repeat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every part has."""

    cluster: Built
    kube: Kube
    """In the namespace of the real jobs."""
    client: Client
    sender: Sender
    wanted: Wanted

    async def scrape(self) -> Scrape:
        """Of the API server."""
        return Scrape.of(await self.sender.text("/metrics"))

    async def scrape_pods(self, component: str) -> Scrape:
        """Of our own pods, summed, through the API server."""
        found = await self.operator_pods(component)
        base = f"/api/v1/namespaces/{NAMESPACE}/pods"
        return Scrape.of(*[await self.sender.text(f"{base}/{each}:8080/proxy/metrics") for each in found])

    async def operator_pods(self, component: str) -> dict[str, str]:
        """By name: the uid of the pods of a Deployment."""
        found = await self.client.list(f"/api/v1/namespaces/{NAMESPACE}/pods", metadata_only=True)
        each = [item["metadata"] for item in found["items"]]
        return {item["name"]: item["uid"] for item in each if item["name"].startswith(f"pillion-{component}-")}

    async def leader(self) -> str:
        """The pod that holds the Lease."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/pillion-controller"
        return str((await self.client.get(path))["spec"]["holderIdentity"]).split("_")[0]


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """Of a histogram, straight within a bucket, as Prometheus' histogram_quantile has it."""
    wanted = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for edge, number in buckets:
        if number >= wanted:
            return (
                edge
                if edge == float("inf") or number == below
                else low + (edge - low) * (wanted - below) / (number - below)
            )
        low, below = edge, number
    return low


def within(buckets: Sequence[tuple[float, float]], edge: float) -> float:
    """The share of a histogram at or below an edge that it has."""
    return dict(buckets)[edge] / max(buckets[-1][1], 1.0)


def at(samples: Sequence[float], share: float) -> float:
    """The quantile of samples: the nearest one above."""
    ordered = sorted(samples)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


class Crowd:
    """
    Fake nodes, kwok, and pods on them.

    Owns: the program kwok on the control machine, its nodes, and the namespaces that `namespace` made; `gone` removes all.
    """

    def __init__(self, cluster: Built, client: Client, sender: Sender, prefix: str, num_nodes: int) -> None:
        self.client = client
        self.sender = sender
        self._control = cluster.machines[CONTROL]
        self._kubeconfig: Path = cluster.kubeconfig
        self._prefix = prefix
        self._nodes = [f"{prefix}-{number}" for number in range(num_nodes)]
        self._namespaces: list[str] = []
        self._made = 0

    async def come(self) -> None:
        """Make the nodes, and have kwok keep them and their pods, and no others."""
        program = await asyncio.to_thread(binaries.program, "kwok")
        for name in self._nodes:
            await self.client.create("/api/v1/nodes", self._node(name))
        self._control.start_program(
            "kwok",
            program,
            f"--kubeconfig={self._kubeconfig}",
            f"--config={STAGES}",
            f"--manage-nodes-with-annotation-selector={FAKE}={self._prefix}",
            # Heartbeats as a kubelet sends them; without leases they come too seldom for the harness's grace period.
            "--node-lease-duration-seconds=40",
        )

        async def is_ready() -> bool:
            node = await self.client.get(f"/api/v1/nodes/{self._nodes[-1]}")
            return bool(condition(node, "Ready").get("status") == "True")

        await until(is_ready, f"kwok to bring the nodes up; its log is {self._control.log('kwok')}", NODES_S)

    async def namespace(self, purpose: str) -> str:
        """A namespace whose pods may be made."""
        name = f"{self._prefix}-{purpose}"
        await self.client.create("/api/v1/namespaces", {"metadata": {"name": name}})
        self._namespaces.append(name)

        async def has_account() -> bool:
            with contextlib.suppress(NotFound):
                return bool(await self.client.get(f"/api/v1/namespaces/{name}/serviceaccounts/default"))
            return False

        await until(has_account, f"the service account of {name}")
        return name

    def pods(self, namespace: str, number: int, *, policy: str = "", num_jobs: int = 1) -> list[Json]:
        """
        So many pods on the fake nodes, not made yet; opted in where there is a policy.

        They name their nodes, so that the scheduler, on the same two cores here, has nothing to do with them.
        """
        found = []
        for index in range(number):
            self._made += 1
            metadata: Json = {
                "namespace": namespace,
                "name": f"llm-{self._made:05d}",
                "labels": {JOB_LABEL: f"llm-{index % num_jobs:04d}"},
            }
            if policy:
                # Pods of nobody: their label alone makes no job of them.
                job_id = metadata["labels"][JOB_LABEL]
                metadata["annotations"] = {annotations.POLICY: policy, annotations.JOB_ID: job_id}
            resources = {"requests": {"cpu": "100m", "memory": "256Mi"}}
            container = {"name": "trainer", "image": "example/trainer:1", "command": ["train"], "resources": resources}
            spec = {
                "nodeName": self._nodes[self._made % len(self._nodes)],
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 30,
                "containers": [container],
            }
            found.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        return found

    async def leave(self, namespace: str) -> None:
        """Remove the pods of a namespace. Blocks: up to `SETTLED_S`."""
        path = f"/api/v1/namespaces/{namespace}/pods"

        async def is_empty() -> bool:
            found = await self.client.get(f"{path}?limit=1")
            if found.get("items"):
                # The collection's delete ends with the request; what is left is asked for again.
                with contextlib.suppress(ApiError, Unreachable):
                    await self.client.delete(f"{path}?gracePeriodSeconds=0&limit=500")
            return not found.get("items")

        await until(is_empty, f"the pods of {namespace} to be gone")

    async def gone(self) -> None:
        """Remove everything. Blocks: up to `SETTLED_S` a namespace."""
        for name in self._namespaces:
            await self.leave(name)
            with contextlib.suppress(NotFound, Conflict):
                await self.client.delete(f"/api/v1/namespaces/{name}")
        for name in self._nodes:
            with contextlib.suppress(NotFound):
                await self.client.delete(f"/api/v1/nodes/{name}")
        if "kwok" in self._control.programs():
            self._control.stop_program("kwok")

    def _node(self, name: str) -> Json:
        amounts = {"cpu": "64", "memory": "512Gi", "pods": str(PODS_A_NODE)}
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "type": "kwok"}
        # Nothing real comes here by itself.
        taint = {"key": FAKE, "value": self._prefix, "effect": "NoSchedule"}
        return {
            "metadata": {"name": name, "labels": labels, "annotations": {FAKE: self._prefix}},
            "spec": {"taints": [taint]},
            "status": {"allocatable": amounts, "capacity": amounts},
        }


async def until(holds: Any, what: str, limit_s: float = SETTLED_S) -> None:
    """
    Ask every `POLL_S` until it is so.

    Raises:
        TimeoutError: it is not so after `limit_s`.
    """
    begun_s = time.monotonic()
    while not await holds():
        if time.monotonic() - begun_s > limit_s:
            raise TimeoutError(f"waited {limit_s:.0f} s for {what}")
        await asyncio.sleep(POLL_S)


def say(text: str) -> None:
    """Print what happens now, and when."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
