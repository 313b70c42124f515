"""
The whole of: a proxy in front of an object store that lets a test's faults strike single requests, and counts all of them.

Called from: tests with an object store.
Must never: strike unless a test has armed a fault, or hold a request for longer than `BOUND`.
"""

import asyncio
import random
import threading
import urllib.parse
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Final, final

import obstore

from support.deadlines import Deadline
from support.object_stores import http1, operations
from support.object_stores.faults import Armed, Fault, refusal
from support.object_stores.operations import Only, Seen
from support.object_stores.places import Place

BOUND: Final = Deadline.COMMITTED
"""Bound of a request that hangs or stalls, if the test does not release it; its connection breaks then."""
MAX_REQUESTS: Final = 100_000
"""Maximum number of requests that are remembered: some hundred bytes each."""
_SIGNED_FOR: Final = timedelta(minutes=5)
_ALL: Final = Only()


@final
class FaultProxy(http1.Server):
    """
    The proxy of one bucket, while in ``with``; `place` is the bucket by way of it. Its methods may be called from any thread.

    A request is struck by the first fault armed that means it, and by no other.
    """

    def __init__(self, behind: Place) -> None:
        super().__init__()
        self._behind = behind
        self._lock = threading.Lock()
        self._armed: list[Armed] = []
        self._seen: deque[Seen] = deque(maxlen=MAX_REQUESTS)
        # Made in the loop, when the first request is held.
        self._gate: asyncio.Event | None = None
        self._num_held = 0

    @property
    def place(self) -> Place:
        """
        The bucket, reached by way of the proxy.
        """
        return self._behind.behind(self.port)

    @property
    def num_held(self) -> int:
        """
        Requests that hang or stall now.
        """
        return self._num_held

    def arm(
        self, fault: Fault, only: Only = _ALL, *, skip: int = 0, times: int | None = 1, delay_s: float = 0.0
    ) -> Armed:
        """
        Let a fault strike the next requests that are meant.

        Args:
            fault: strikes them.
            only: which requests are meant.
            skip: of them, these go through first.
            times: it strikes so many; None: all, until `disarm`.
            delay_s: seconds that LATE makes a request wait.
        """
        return self._arm([fault], only, skip=skip, times=times, delay_s=delay_s, rate=1.0, seed=0)

    def arm_at_random(self, faults: Sequence[Fault], only: Only = _ALL, *, rate: float, seed: int) -> Armed:
        """
        Let one of these faults strike a share of the requests, until `disarm`.

        The seed fixes which of the requests are struck, in the order in which they come; clients in threads make an order of their own.
        """
        return self._arm(faults, only, skip=0, times=None, delay_s=0.0, rate=rate, seed=seed)

    def disarm(self) -> None:
        """
        Let no fault strike any more. What hangs goes on hanging.
        """
        with self._lock:
            self._armed = []

    def release(self) -> None:
        """
        Let go what hangs or stalls now.
        """

        def let_go() -> None:
            if self._gate is not None:
                self._gate.set()
            self._gate = None

        self._background.call(let_go)

    def seen(self, only: Only = _ALL) -> list[Seen]:
        """
        The requests that came, oldest first; tries of a client count apart.
        """
        with self._lock:
            return [each for each in self._seen if only.means(each)]

    def forget(self) -> None:
        """
        Begin to count anew.
        """
        with self._lock:
            self._seen.clear()

    async def serve(self, request: http1.Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """
        One request: strike it, or carry it to the store and the answer back.
        """
        seen = operations.read(self._behind.kind, request)
        fault, delay_s = self._choose(seen)
        if fault is Fault.STALL_UPLOAD:
            seen.num_bytes_up = len(await reader.readexactly(request.num_body_bytes // 2))
            await self._hold()
            return False
        request = await http1.read_body(reader, writer, request)
        seen.num_bytes_up = len(request.body)
        if fault is Fault.CUT_BEFORE or (fault is Fault.HANG and not await self._hold()):
            return False
        if fault is Fault.LATE:
            await asyncio.sleep(delay_s)
        refused = refusal(self._behind.kind, fault) if fault is not None else None
        if refused is not None and fault is not Fault.FAILED_AFTER:
            return await self._answer(writer, seen, refused)
        if fault is Fault.UNCONDITIONAL and seen.conditional:
            request = self._without_condition(seen, request)
        answer = await http1.ask("127.0.0.1", self._behind.port, request)
        if fault is Fault.CUT_AFTER or (fault is Fault.HANG_AFTER and not await self._hold()):
            return False
        return await self._answer(writer, seen, refused or answer, fault)

    async def _answer(
        self, writer: asyncio.StreamWriter, seen: Seen, answer: http1.Answer, fault: Fault | None = None
    ) -> bool:
        body = b"" if seen.method == "HEAD" else answer.body
        middle = len(body) // 2
        if fault is Fault.FLIP and body:
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        seen.status = answer.status
        # Counted before it is sent: a client that has it all may look at once.
        seen.num_bytes_down = middle
        await http1.write(writer, answer.head(len(body)) + body[:middle])
        if fault is Fault.TRUNCATE or (fault is Fault.STALL_DOWNLOAD and not await self._hold()):
            return False
        seen.num_bytes_down = len(body)
        await http1.write(writer, body[middle:])
        return True

    async def _hold(self) -> bool:
        """Wait until the test lets go. False: it did not within the bound."""
        if self._gate is None:
            self._gate = asyncio.Event()
        self._num_held += 1
        try:
            async with asyncio.timeout(BOUND.s):
                await self._gate.wait()
        except TimeoutError:
            return False
        finally:
            self._num_held -= 1
        return True

    def _choose(self, seen: Seen) -> tuple[Fault | None, float]:
        with self._lock:
            self._seen.append(seen)
            for armed in self._armed:
                if fault := armed.choose(seen):
                    return fault, armed.delay_s
        return None, 0.0

    def _arm(
        self,
        faults: Sequence[Fault],
        only: Only,
        *,
        skip: int,
        times: int | None,
        delay_s: float,
        rate: float,
        seed: int,
    ) -> Armed:
        armed = Armed(
            faults=faults,
            only=only,
            skip=skip,
            times=times,
            rate=rate,
            rng=random.Random(seed),
            delay_s=delay_s,
            struck=[],
        )
        with self._lock:
            self._armed.append(armed)
        return armed

    def _without_condition(self, seen: Seen, request: http1.Request) -> http1.Request:
        """The same put without its condition. The client has signed the condition, so it is signed anew, in its address."""
        kept = [pair for pair in request.headers if pair[0].lower() not in operations.CONDITIONS]
        if self._behind.kind == "gcs":
            return replace(request, headers=kept)
        signed = urllib.parse.urlsplit(obstore.sign(self._behind.client(), "PUT", seen.key, _SIGNED_FOR))
        headers = [("Host", signed.netloc), ("Content-Length", str(len(request.body)))]
        if self._behind.kind == "azure":
            headers.append(("x-ms-blob-type", "BlockBlob"))
        return replace(request, target=f"{signed.path}?{signed.query}", headers=headers)
