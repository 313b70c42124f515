"""
Bulk bytes to and from a bucket, beside obstore alone and beside what stock DCP writes with; into a sink on the loopback.

    python benchmarks/bench_objects.py WRITER URL ENDPOINT BYTES     one save of a peer, as a process of its own; prints its figures

Called from: run.py. The sink (`object_sink`) keeps nothing, so that the client's own cost shows. It leaves out: a network, a store that takes
its time, TLS. `obstore alone` sends the same stretches of the same memory in as many requests, with nothing around them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from datetime import timedelta
from pathlib import Path
from typing import Any

import floors
import measures

from pillion.wire.object_store import ObjectStore
from pillion_sidecar.storage.objects import ObjectFolder
from pillion_sidecar.storage.stretches import Piece, Run

OBJECT_BYTES = 128 << 20
ITEM_BYTES = 16 << 20
RANGE_BYTES = 16 << 20
PARALLELISM = 4
PEERS = ("s3torchconnector",)
"""Writers of stock DCP that the environment has. s3fs cannot be in it: see requirements/s3fs.in."""
PEER_TIMEOUT_S = 600.0
MIB = 1 << 20


def measure(of: measures.Settings) -> list[measures.Line]:
    num_bytes = of.num_bytes // OBJECT_BYTES * OBJECT_BYTES
    memory = floors.shared_memory(num_bytes)
    os.environ.update({"AWS_ACCESS_KEY_ID": "sink", "AWS_SECRET_ACCESS_KEY": "sink"})
    with _sink() as endpoint:
        folder = ObjectFolder.open("s3://sink/run", ObjectStore(endpoint=endpoint, region="us-east-1"))
        bare = _bare(endpoint)
        names = [f"__0_{number}.1.distcp" for number in range(num_bytes // OBJECT_BYTES)]
        files = {name: _runs(number * OBJECT_BYTES, OBJECT_BYTES) for number, name in enumerate(names)}

        def upload() -> None:
            folder.write(files, memory, num_threads=PARALLELISM)

        def upload_bare() -> None:
            def put(name: str) -> None:
                views = (memory[run.slot_offset : run.slot_offset + run.length] for run in files[name])
                bare.put(f"run/{name}", views, use_multipart=False)

            with futures.ThreadPoolExecutor(PARALLELISM) as pool:
                list(pool.map(put, names))

        def load() -> None:
            for number, name in enumerate(names):
                pieces = [
                    Piece(run.slot_offset - number * OBJECT_BYTES, run.slot_offset, run.length) for run in files[name]
                ]
                folder.read_into(name, memory, pieces)

        def load_bare() -> None:
            def get(start: int) -> None:
                number, offset = divmod(start, OBJECT_BYTES)
                data = bare.get_range(f"run/{names[number]}", start=offset, length=RANGE_BYTES)
                memory[start : start + RANGE_BYTES] = memoryview(data)

            with futures.ThreadPoolExecutor(PARALLELISM) as pool:
                list(pool.map(get, range(0, num_bytes, RANGE_BYTES)))

        lines = _pair("upload", upload, upload_bare, num_bytes, of.repeat, cpu_goal=0.3)
        lines += _pair("ranged load", load, load_bare, num_bytes, of.repeat, cpu_goal=None)
        for peer in PEERS:
            lines += _peer(peer, endpoint, num_bytes)
    return lines


def _pair(
    what: str,
    ours: Callable[[], None],
    bare: Callable[[], None],
    num_bytes: int,
    repeat: int,
    *,
    cpu_goal: float | None,
) -> list[measures.Line]:
    """In turn: ours and the library alone. The first of each is not counted: it makes the connections."""
    ratios, rates, cpu, extra = [], [], [], []
    for _ in range(repeat + 1):
        bare_s = measures.seconds(bare)
        begun_s, before = time.perf_counter(), _cpu_s()
        with _peak() as peak_mib:
            ours()
        took_s = time.perf_counter() - begun_s
        cpu.append((_cpu_s() - before) / (num_bytes / 2**30))
        ratios.append(bare_s / took_s)
        rates.append(num_bytes / took_s / 2**30)
        extra.append(peak_mib[0])
    return [
        measures.median_line(f"{what} rate / obstore alone", ratios[1:], goal=0.9, sense=">="),
        measures.median_line(f"{what} rate into a sink", rates[1:], unit="GiB/s"),
        measures.median_line(f"processor time of a {what}", cpu[1:], unit="s/GiB", goal=cpu_goal),
        measures.Line(
            what=f"extra memory of a {what}", measured=max(extra[1:]), unit="MiB", goal=64.0, samples=tuple(extra[1:])
        ),
    ]


def _peer(peer: str, endpoint: str, num_bytes: int) -> list[measures.Line]:
    """One save of stock DCP with another writer, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), peer, "s3://sink/peer", endpoint, str(num_bytes)],
        capture_output=True,
        text=True,
        timeout=PEER_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        return [measures.Line(what=f"{peer}: {done.stderr.strip().splitlines()[-1][:120]}", measured=float("nan"))]
    figures = json.loads(done.stdout.splitlines()[-1])
    return [
        measures.Line(what=f"stock DCP with {peer}: rate into the sink", measured=figures["rate"], unit="GiB/s"),
        measures.Line(what=f"stock DCP with {peer}: processor time", measured=figures["cpu"], unit="s/GiB"),
        measures.Line(what=f"stock DCP with {peer}: extra memory", measured=figures["extra_mib"], unit="MiB"),
    ]


def save_as_peer(peer: str, url: str, endpoint: str, num_bytes: int) -> dict[str, float]:
    """
    Save the same bytes by stock DCP and another writer, twice; the figures of the second save.

    Raises:
        SystemExit: an unknown peer.
    """
    import torch.distributed.checkpoint as dcp

    if peer != "s3torchconnector":
        raise SystemExit(f"unknown writer {peer!r}; known are {', '.join(PEERS)}")
    from s3torchconnector.dcp import S3StorageWriter

    state = measures.state(num_bytes, num_bytes // ITEM_BYTES)
    figures = {}
    most_mib = 0.0
    for step in (1, 2):
        writer = S3StorageWriter(region="us-east-1", path=f"{url}/step-{step}", overwrite=True)
        # It has no argument for an endpoint; its client is made with the first request.
        client: Any = writer.fs
        client._client._endpoint = endpoint
        begun_s, before = time.perf_counter(), _cpu_s()
        with _peak() as peak_mib:
            dcp.save(state, storage_writer=writer)
        took_s = time.perf_counter() - begun_s
        # Of both saves: what the first one's pool keeps would not show in the second.
        most_mib = max(most_mib, peak_mib[0])
        figures = {
            "rate": num_bytes / took_s / 2**30,
            "cpu": (_cpu_s() - before) / (num_bytes / 2**30),
            "extra_mib": most_mib,
        }
    return figures


def _runs(start: int, length: int) -> list[Run]:
    return [Run(start + offset, min(ITEM_BYTES, length - offset)) for offset in range(0, length, ITEM_BYTES)]


def _bare(endpoint: str) -> Any:
    from obstore.store import S3Store

    return S3Store(
        "sink",
        endpoint=endpoint,
        region="us-east-1",
        virtual_hosted_style_request=False,
        unsigned_payload=True,
        client_options={"allow_http": True, "timeout": timedelta(seconds=120)},
    )


@contextlib.contextmanager
def _sink() -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("object_sink.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise AssertionError("a pipe was asked for")
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.communicate()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def _peak() -> Iterator[list[float]]:
    """The most that anonymous memory of this process grew meanwhile, MiB; known at the end. The arena is no anonymous memory."""
    peak, stop = [0.0], threading.Event()
    base = _anonymous_mib()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _anonymous_mib() - base)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _anonymous_mib() -> float:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))


if __name__ == "__main__":
    print(json.dumps(save_as_peer(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
