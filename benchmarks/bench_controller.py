"""
Memory and CPU of the active controller while many jobs call home and many injected pods are there.

    python benchmarks/bench_controller.py [--jobs 500] [--pods 5000] [--checkpoints 10] [--seconds 120]

Called from: people. The controller is a process of its own (simulated_cluster.py); here are the sidecars: one TLS connection a job,
each with real reports, at the interval that it is told. Every job commits once in `COMMIT_S`, so that objects come and go.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import ssl
import statistics
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import simulated_cluster as cluster

from pillion.wire import home

COMMIT_S = 300.0
"""Between two commits of a job."""
WARM_S = 20.0
"""Until every job has reported a few times."""
START_S = 60.0
"""For the controller to lead."""
GOAL_MIB = 200.0
GROWTH_GOAL_PERCENT = 2.0


@dataclasses.dataclass
class Seen:
    latencies_s: list[float] = dataclasses.field(default_factory=list)
    refused: int = 0
    interval_s: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the controller with simulated jobs.")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--pods", type=int, default=5000)
    parser.add_argument("--checkpoints", type=int, default=10, help="of each job")
    parser.add_argument("--seconds", type=float, default=120.0, help="of steady state")
    parser.add_argument("--fresh", action="store_true", help="a new TLS connection for each report")
    given = parser.parse_args()
    program = Path(__file__).with_name("simulated_cluster.py")
    command = [sys.executable, str(program), str(given.jobs), str(given.pods), str(given.checkpoints)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        begun = json.loads(process.stdout.readline())
        print(f"leads: {memory_mib(process.pid):.0f} MiB")
        try:
            asyncio.run(measure(process.pid, begun, given.jobs, given.checkpoints, given.seconds, fresh=given.fresh))
        finally:
            process.stdin.close()
            process.wait(START_S)


async def measure(
    pid: int, begun: dict[str, str], num_jobs: int, num_checkpoints: int, seconds: float, *, fresh: bool = False
) -> None:
    context = ssl.create_default_context(cadata=begun["authority"])
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    seen = Seen()
    connector = aiohttp.TCPConnector(limit=0, ssl=context, force_close=fresh)
    async with aiohttp.ClientSession(connector=connector) as session:
        url = f"https://127.0.0.1:{begun['port']}{home.REPORT_PATH}"
        jobs = [asyncio.create_task(_job(session, url, job, num_checkpoints, seen)) for job in range(num_jobs)]
        await asyncio.sleep(WARM_S)
        warm_cpu_s, warm_s = cpu_s(pid), time.monotonic()
        seen.latencies_s.clear()
        sizes = []
        while time.monotonic() - warm_s < seconds:
            await asyncio.sleep(1.0)
            sizes.append(memory_mib(pid))
        passed_s = time.monotonic() - warm_s
        used_s = cpu_s(pid) - warm_cpu_s
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
    last_mib = statistics.median(sizes[-10:])
    # From the middle on: a burst, as after a change of the leader, leaves the heap as large as it needed to be once.
    middle = len(sizes) // 2
    growth = (last_mib / statistics.median(sizes[middle : middle + 10]) - 1) * 100
    latencies = sorted(seen.latencies_s)
    print(f"memory: {last_mib:.0f} MiB at the end, {max(sizes):.0f} MiB at most; goal {GOAL_MIB:.0f} MiB")
    print(f"growth over the last {passed_s / 2:.0f} s: {growth:+.1f} %; goal {GROWTH_GOAL_PERCENT:.0f} %")
    print(f"CPU: {used_s / passed_s * 100:.1f} % of a core, {used_s / len(latencies) * 1000:.2f} ms a report")
    print(
        f"reports: {len(latencies) / passed_s:.0f} a second, {seen.refused} refused; interval {seen.interval_s:.1f} s"
    )
    p50, p99 = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
    print(f"answered within {p50 * 1000:.1f} ms (median), {p99 * 1000:.1f} ms (99 %)")


async def _job(session: aiohttp.ClientSession, url: str, job: int, num_checkpoints: int, seen: Seen) -> None:
    """One sidecar."""
    steps = [cluster.STEP * number for number in range(1, num_checkpoints + 1)]
    commit_at_s = time.monotonic() + random.uniform(0, COMMIT_S)
    headers = {"Authorization": f"Bearer {cluster.token(job)}"}
    await asyncio.sleep(random.uniform(0, home.DEFAULT_INTERVAL_S))
    passed = 0
    while True:
        if time.monotonic() >= commit_at_s:
            commit_at_s += COMMIT_S
            steps = [*steps[1:], steps[-1] + cluster.STEP]
        passed += 1
        begun_s = time.monotonic()
        async with session.post(
            url, data=home.encode(_report(job, steps, passed)), headers=headers, server_hostname=cluster.HOME
        ) as response:
            body = await response.read()
        seen.latencies_s.append(time.monotonic() - begun_s)
        if response.status != 200:
            seen.refused += 1
            await asyncio.sleep(home.DEFAULT_INTERVAL_S)
            continue
        seen.interval_s = home.decode_answer(body).interval_s
        await asyncio.sleep(seen.interval_s)


def _report(job: int, steps: list[int], passed: int) -> home.Report:
    at = "2026-11-24T00:00:00Z"
    stored = tuple(
        home.CommittedCheckpoint(
            step=step,
            path=f"{cluster.job_id(job)}/step-{step}",
            size_bytes=12 * 2**30,
            world_size=64,
            started=at,
            completed=at,
        )
        for step in reversed(steps)
    )
    return home.Report(
        namespace=cluster.NAMESPACE,
        pod=cluster.pod_name(job, 0),
        pod_uid=cluster.pod_uid(job, 0),
        policy=cluster.POLICY,
        job_kind="Job",
        job_name=cluster.job_id(job),
        job_id=cluster.job_id(job),
        session=f"{job:032x}",
        world_size=64,
        num_pods=8,
        policy_generation=1,
        step=steps[-1] + passed,
        snapshot_time=at,
        committed_step=steps[-1],
        committed_time=at,
        checkpoints=stored,
        listed=True,
        metrics={"saves_committed": passed, "persist_seconds": 1.5 * passed, "persisted_bytes": passed * 2**30},
    )


def memory_mib(pid: int) -> float:
    """Resident memory of a process, MiB."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmRSS"].split()[0]) / 1024


def cpu_s(pid: int) -> float:
    """CPU that a process has used, seconds."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    main()
