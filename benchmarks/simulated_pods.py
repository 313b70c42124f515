"""
Pods that only agree: one loop over plain sockets, one connection to the store for each pod. They write a file of one byte for each save, which the
coordinator looks for.

    python simulated_pods.py PORT ROOT LAYOUT_DIGEST NUM_SAVES RANK...

Called from: bench_commit.py, which runs the coordinator and shares its cores with this process. So a pod here does only what reaches the store or the
storage: it sends the requests of an executor in their order (`StoreExchange` over `StoreClient`), and waits for each answer. It decodes no document. All pods
write their last byte before one of them says so: then all results come at once, which is the hardest case for store and coordinator. A pod ends with the last
save; every wait has a bound. Prints one JSON list: for each save the time at which the last pod had written its file, monotonic seconds.
"""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path

from pillion.wire import names
from pillion_sidecar.executor.exchange import tcpstore
from pillion_sidecar.executor.exchange.store_client import KEY_PREFIX, MAGIC, Query
from pillion_sidecar.storage import generation

PREFIX = "bench/"
TIMEOUT_S = 600.0
"""Timeout of a wait for the next answer to any pod. Hundreds connect at once."""
SPARE_FILES = 64
"""Open files of this process beside the connections."""
GENERATION = generation.text(1, generation.save_number(0, rescued=False))
"""As the coordinator's, bench_commit.py: the first session, no load, no rescue."""
NONCE = struct.pack("<I", 7)
ONE_BYTE = 1
"""Length of an answer to CHECK and to WAIT."""
VALUE = 0
"""In place of a length: the answer is a value, whose length comes first."""

Life = Generator[tuple[bytes, int] | None, None, None]
"""Yields a request, and the length of its answer; None when the pod has written its last byte."""


def life(root: Path, layout_digest: str, num_saves: int, rank: int) -> Life:
    """What one pod asks of the store, to its end."""
    yield bytes([Query.VALIDATE]) + struct.pack("<I", MAGIC) + bytes([Query.PING]) + NONCE, len(NONCE)
    plan = tcpstore.pack({"failures": {}, "ranks": {str(rank): [layout_digest, []]}})[0]
    name = names.part_file(rank, GENERATION)
    result = {
        "failures": {},
        "generation": GENERATION,
        "part": name,
        "files": {},
        "digest": "0" * 32,
        "length": 1,
        "size_bytes": 1,
    }
    posted = tcpstore.pack(result)[0]
    for step in range(1, num_saves + 1):
        phase = f"save/0/{step}"
        yield _post(f"{phase}/plan/{rank}", plan), ONE_BYTE
        yield _keys(Query.WAIT, [f"{phase}/plan/decision"]), ONE_BYTE
        yield _keys(Query.MULTI_GET, [f"{phase}/plan/decision"]), VALUE
        _write(root / names.step_directory(step), name)
        yield None
        yield _post(f"{phase}/0/result/{rank}", posted), ONE_BYTE
        yield _keys(Query.WAIT, [f"{phase}/0/outcome/decision"]), ONE_BYTE
        yield _keys(Query.MULTI_GET, [f"{phase}/0/outcome/decision"]), VALUE


def _write(folder: Path, name: str) -> None:
    try:
        opened = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
    except FileNotFoundError:
        folder.mkdir(exist_ok=True)
        opened = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
    os.write(opened, b"x")
    os.close(opened)


def _post(key: str, value: str) -> bytes:
    """Return the requests that write a value and make sure of it."""
    return bytes([Query.SET]) + _text(f"{KEY_PREFIX}{PREFIX}/{key}") + _text(value) + _keys(Query.CHECK, [key])


def _keys(query: Query, keys: Sequence[str]) -> bytes:
    return (
        bytes([query]) + struct.pack("<Q", len(keys)) + b"".join(_text(f"{KEY_PREFIX}{PREFIX}/{key}") for key in keys)
    )


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


class _Pod:
    """One connection, and what its pod waits for."""

    def __init__(self, port: int, talk: Life) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._talk = talk
        self._awaited = 0
        self._answer = b""

    def ask(self) -> bool:
        """Send the next request. False: the pod has written its last byte, and says so at the next call; or it has ended."""
        asked = next(self._talk, None)
        if asked is None:
            return False
        request, self._awaited = asked
        self.connection.sendall(request)
        return True

    def answered(self) -> bool:
        """Read what is there. Return whether the answer is whole. Raises ConnectionError."""
        data = self.connection.recv(1 << 16)
        if not data:
            raise ConnectionError("the store has closed the connection of a simulated pod")
        self._answer += data
        length = self._awaited
        if length == VALUE:
            if len(self._answer) < 8:
                return False
            length = 8 + int.from_bytes(self._answer[:8], "little")
        if len(self._answer) < length:
            return False
        self._answer = b""
        return True


def main() -> None:
    port, root, layout_digest, num_saves, *ranks = sys.argv[1:]
    wanted = len(ranks) + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    pods: dict[int, _Pod] = {}
    poll = select.epoll()
    for rank in ranks:
        pod = _Pod(int(port), life(Path(root), layout_digest, int(num_saves), int(rank)))
        pods[pod.connection.fileno()] = pod
        poll.register(pod.connection, select.EPOLLIN)
        pod.ask()
    last_bytes = []
    for _ in range(int(num_saves)):
        _answer_all(poll, pods)
        last_bytes.append(time.monotonic())
        for pod in pods.values():
            pod.ask()
    _answer_all(poll, pods)
    print(json.dumps(last_bytes))


def _answer_all(poll: select.epoll, pods: dict[int, _Pod]) -> None:
    """Let every pod ask until it has no request for now. Raises TimeoutError."""
    busy = len(pods)
    while busy:
        ready = poll.poll(TIMEOUT_S)
        if not ready:
            raise TimeoutError(f"the store has answered no simulated pod for {TIMEOUT_S:.0f} s")
        busy -= sum(pods[number].answered() and not pods[number].ask() for number, _ in ready)


if __name__ == "__main__":
    main()
