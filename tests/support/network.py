"""
The whole of: a network of its own for every pod of a test, joined by a bridge in that of the job's store, so that a link can be cut.

Called from: tests of the level distributed that cut one. Needs root and `ip` (iproute2); `missing()` says what is not there.
Must never: touch a namespace that it did not make, or leave one behind.

A cut link loses packets, as a broken switch does: no connection is refused or reset, and what was sent is sent again once it is whole.
"""

import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from support.deadlines import Deadline

_SUBNET: Final = "198.18.0"
"""Subnet of RFC 2544 for tests between networks, which no router forwards."""
_NAMESPACES: Final = Path("/run/netns")
_CLONE_NEWNET: Final = 0x40000000
INTERFACE: Final = "eth0"


def missing() -> str:
    """
    What a network needs and this machine has not; empty: nothing.
    """
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    return "" if shutil.which("ip") else "making network namespaces needs `ip` (iproute2)"


@final
class Network:
    """
    Namespaces: one for the store, one for each pod. `close` removes them.

    Args:
        pods: their names.
    """

    def __init__(self, pods: Sequence[str]) -> None:
        self._mark = f"pillion-{uuid.uuid4().hex[:8]}"
        self._made: list[str] = []
        self.store = self._make("store")
        self.store_address = f"{_SUBNET}.1"
        self._ip("-n", self.store, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self.store, "address", "add", f"{self.store_address}/24", "dev", "bridge")
        self._ip("-n", self.store, "link", "set", "bridge", "up")
        self.pods: dict[str, str] = {}
        """Pod -> its namespace."""
        for index, pod in enumerate(pods):
            namespace = self.pods[pod] = self._make(pod)
            peer = ("peer", "name", INTERFACE, "netns", namespace)
            self._ip("-n", self.store, "link", "add", f"pod-{pod}", "type", "veth", *peer)
            self._ip("-n", self.store, "link", "set", f"pod-{pod}", "master", "bridge", "up")
            self._ip("-n", namespace, "address", "add", f"{_SUBNET}.{index + 2}/24", "dev", INTERFACE)
            self._ip("-n", namespace, "link", "set", INTERFACE, "up")

    def cut(self, pod: str) -> None:
        """
        From now on nothing passes between the pod and the others.
        """
        self._ip("-n", self.store, "link", "set", f"pod-{pod}", "nomaster")

    def mend(self, pod: str) -> None:
        """
        The pod is back.
        """
        self._ip("-n", self.store, "link", "set", f"pod-{pod}", "master", "bridge")

    def close(self) -> None:
        """
        Removes the namespaces; processes that are still in one keep it until they end.
        """
        for namespace in self._made:
            self._ip("netns", "delete", namespace)
        self._made.clear()

    def _make(self, name: str) -> str:
        namespace = f"{self._mark}-{name}"
        self._ip("netns", "add", namespace)
        self._made.append(namespace)
        self._ip("-n", namespace, "link", "set", "lo", "up")
        return namespace

    def _ip(self, *arguments: str) -> None:
        subprocess.run(("ip", *arguments), check=True, timeout=Deadline.REPLY.s)


def enter(namespace: str) -> None:
    """
    Move this process, of one thread, into a namespace. Sockets that are open stay where they were made.
    """
    fd = os.open(_NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # os.setns came with Python 3.12.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{namespace}: {os.strerror(number)}")
    finally:
        os.close(fd)
