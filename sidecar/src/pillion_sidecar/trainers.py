"""
The trainers of this pod: the arena of their session, who of them is connected, and what they are told.

Called from: the supervisor and its parts, which share one of these. What all trainers of the job are told goes to those of this pod
at once, and to those of other pods through the executor and the job's store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pillion.errors import SidecarError
from pillion.wire import messages
from pillion_sidecar import background
from pillion_sidecar.control import Client
from pillion_sidecar.operation import Operations
from pillion_sidecar.pod import Pod


class Trainers:
    """See the module."""

    def __init__(
        self, operations: Operations, tasks: background.Tasks, *, on_policy: Callable[[messages.Message], None]
    ) -> None:
        self.pod: Pod | None = None
        self.clients: dict[int, Client] = {}
        self.idle_since = time.monotonic()
        self.parted = False
        """Every trainer of the session ended well: an embedded sidecar is not needed any more."""
        self.crashed = False
        """A trainer of this session died, or ended by an exception: a restart may come for the arena."""
        self.on_rescue: Callable[[str], None] = lambda _: None
        """Called when a pod of the job calls all of them to persist the newest snapshot that all of them hold."""
        self._on_policy = on_policy
        """Called with what the coordinator's sidecar says of the policy."""
        self._operations = operations
        self._tasks = tasks

    def require_pod(self) -> Pod:
        if self.pod is None:
            raise SidecarError("no session is open")
        return self.pod

    def broadcast(self, message: Mapping[str, Any], *, but: int | None = None) -> None:
        """Tell the trainers of this pod."""
        for rank, client in self.clients.items():
            if rank != but:
                client.send(message)

    def notice(self, rank: int, text: str) -> None:
        """Have a trainer's log say something."""
        if rank in self.clients:
            self.clients[rank].send({"type": "notice", "text": text})

    def signal(self, message: dict[str, Any]) -> None:
        """Tell all trainers of the job: those of this pod at once, those of others through the executor."""
        pod = self.pod
        if pod is None or len(pod.identity.pods) == 1:
            self.heard(message)
            return
        # In the background: the executor may be busy, and this trainer's next message must not wait for it.
        self._tasks.start(self._signal(pod, message), "signal")

    async def _signal(self, pod: Pod, message: dict[str, Any]) -> None:
        await self._operations.signal(pod, message)

    def heard(self, message: messages.Message) -> None:
        """What a trainer or sidecar of this job told all of them."""
        if message["type"] == "save_now":
            # Rank 0 decides at which step, so that all ranks save at the same one.
            decider = self.clients.get(0)
            if decider is not None:
                decider.send({"type": "save_now"})
            return
        if message["type"] == "policy":
            self._on_policy(message)
            return
        if message["type"] == "rescue":
            self.on_rescue(messages.field(message, "id", str))
            return
        told = {"type": message["type"], "step": messages.field(message, "step", int)}
        if message["type"] == "change_announced":
            told["policy"] = messages.field(message, "policy", dict)
        self.broadcast(told)

    def save_now(self) -> None:
        """Have the trainers save at a step that all of them have ahead of them."""
        if 0 in self.clients:
            self.heard({"type": "save_now"})
        else:
            self.signal({"type": "save_now"})
