"""
Sidecars that only call home: one asyncio program for all of them, with real tokens, over TLS, to the active controller.

    nsenter --net=... python cluster_reports.py        told by bench_cluster.py on the standard input, one JSON object a line:
        {"address", "port", "name", "authority", "jobs": [{"namespace", "pod", "pod_uid", "policy", "kind", "job", "token"}]}
        "measure"                                      forget the times so far
        "end"                                          print what was measured, and end; so does the end of the input
    it prints {"reporting": N} once every job was answered, and at the end what `Seen` has

Called from: bench_cluster.py, in the network of the control machine, which reaches pods as a node does.
Must never: import torch, or go on without whoever started it.
"""

import asyncio
import dataclasses
import json
import random
import ssl
import sys
import time
from typing import Any, Final

import aiohttp

from pillion.wire import home
from pillion_operator.home import times

Json = dict[str, Any]

CHECKPOINTS: Final = 3
"""Of each job: `retention.keepLast` of the default policy."""
COMMIT_S: Final = 300.0
"""Between two commits of a job: one Checkpoint object comes, and one goes."""
STEP: Final = 100
"""Training steps between the checkpoints of a job."""
RAMP_S: Final = 20.0
"""In which the jobs begin to report: after an upgrade they come back within as many seconds."""
REQUEST_S: Final = 10.0
"""As long as a sidecar waits."""


@dataclasses.dataclass
class Seen:
    """What came of the reports."""

    latencies_s: list[float] = dataclasses.field(default_factory=list)
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    """By HTTP status, or the name of the error."""
    interval_s: float = 0.0
    answered: set[int] = dataclasses.field(default_factory=set)
    """Jobs that were answered at all."""


async def main() -> None:
    loop = asyncio.get_running_loop()
    given: Json = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    context = ssl.create_default_context(cadata=given["authority"])
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    seen = Seen()
    url = f"https://{given['address']}:{given['port']}{home.REPORT_PATH}"
    connector = aiohttp.TCPConnector(limit=0, ssl=context)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=REQUEST_S)) as session:
        jobs = given["jobs"]
        running = [
            asyncio.create_task(_job(session, url, given["name"], number, jobs, seen)) for number in range(len(jobs))
        ]
        said = asyncio.create_task(_say_when_all_report(seen, len(jobs)))
        while (await loop.run_in_executor(None, sys.stdin.readline)).strip() == "measure":
            seen.latencies_s.clear()
            seen.refused.clear()
        for task in (said, *running):
            task.cancel()
        results = await asyncio.gather(*running, return_exceptions=True)
    broken = [repr(each) for each in results if not isinstance(each, asyncio.CancelledError)]
    print(json.dumps(dataclasses.asdict(seen) | {"answered": len(seen.answered), "broken": broken[:3]}), flush=True)


async def _say_when_all_report(seen: Seen, number: int) -> None:
    while len(seen.answered) < number:
        await asyncio.sleep(0.5)
    print(json.dumps({"reporting": number}), flush=True)


async def _job(session: aiohttp.ClientSession, url: str, name: str, number: int, jobs: list[Json], seen: Seen) -> None:
    """One job's sidecar."""
    of = jobs[number]
    steps = [STEP * each for each in range(1, CHECKPOINTS + 1)]
    headers = {"Authorization": f"Bearer {of['token']}", "Content-Type": "application/json"}
    await asyncio.sleep(random.uniform(0, RAMP_S))
    commit_at_s = time.monotonic() + random.uniform(0, COMMIT_S)
    times_s = [time.time() - COMMIT_S * back for back in reversed(range(CHECKPOINTS))]
    passed = 0
    while True:
        if time.monotonic() >= commit_at_s:
            commit_at_s += COMMIT_S
            steps = [*steps[1:], steps[-1] + STEP]
            times_s = [*times_s[1:], time.time()]
        passed += 1
        body = home.encode(_report(of, steps, times_s, passed, number))
        begun_s = time.perf_counter()
        why, answer = "", b""
        try:
            async with session.post(url, data=body, headers=headers, server_hostname=name) as response:
                answer = await response.read()
            if response.status != 200:
                why = f"{response.status} {answer.decode(errors='replace')[:200]}"
        except (aiohttp.ClientError, TimeoutError) as err:
            why = type(err).__name__
        if why:
            seen.refused[why] = seen.refused.get(why, 0) + 1
            await asyncio.sleep(home.DEFAULT_INTERVAL_S)
            continue
        seen.latencies_s.append(time.perf_counter() - begun_s)
        seen.answered.add(number)
        seen.interval_s = home.decode_answer(answer).interval_s
        await asyncio.sleep(seen.interval_s)


def _report(of: Json, steps: list[int], times_s: list[float], passed: int, number: int) -> home.Report:
    stored = tuple(
        home.CommittedCheckpoint(
            step=step,
            path=f"{of['job']}/step-{step}",
            size_bytes=12 * 2**30,
            world_size=64,
            started=times.text(at_s - 30),
            completed=times.text(at_s),
        )
        for step, at_s in zip(reversed(steps), reversed(times_s), strict=True)
    )
    return home.Report(
        namespace=of["namespace"],
        pod=of["pod"],
        pod_uid=of["pod_uid"],
        policy=of["policy"],
        job_kind=of["kind"],
        job_name=of["job"],
        job_id=of["job"],
        session=f"{number:032x}",
        world_size=64,
        num_pods=8,
        policy_generation=1,
        step=steps[-1] + passed,
        snapshot_time=times.text(time.time()),
        committed_step=steps[-1],
        committed_time=times.text(times_s[-1]),
        checkpoints=stored,
        listed=True,
        metrics={"saves_committed": passed, "persist_seconds": 1.5 * passed, "persisted_bytes": passed * 2**30},
    )


if __name__ == "__main__":
    asyncio.run(main())
