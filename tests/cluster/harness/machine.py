"""
The whole of: a machine of the test cluster: a process tree in namespaces of its own, on a network that the harness made.

    this machine, 10.77.0.254 ---+--- control   10.77.0.1    etcd, API server, controllers, scheduler; and the bridge
                                 +--- node1     10.77.0.11   containerd, kubelet, kube-proxy; pods 10.78.1.0/24
                                 +--- node2     10.77.0.12   ...                                   10.78.2.0/24

Called from: `built`. A machine's network namespace holds its addresses, routes and iptables; its process namespace ends with its
process 1; its mount namespace forgets its mounts. So stopping a machine leaves nothing but its folder.
Must never: change an address, a route or a rule of this machine's own network, but for the one link into the cluster.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cluster.harness.limits import Limit

INIT: Final = Path(__file__).with_name("machine_init.py")
PREFIX: Final = "pillion-"
HOST_LINK: Final = "pillion-host"
HOST_ADDRESS: Final = "10.77.0.254"
NETWORK_BITS: Final = 24
BRIDGE: Final = "pillion0"
POLL_S: Final = 0.05
_STARTED: Final[list[subprocess.Popen[bytes]]] = []
"""Machines of this process, for its life: a Popen that is collected complains of a process that is to outlive it."""


class HarnessError(Exception):
    """The cluster could not be made, or be taken down; the text says which part, and where its log is."""


def run(*command: str | Path, limit: Limit = Limit.COMMAND, **options: Any) -> str:
    """
    Run a command to its end; its standard output. What it has started ends with it when the limit passes, or an exception comes.

    Raises:
        HarnessError: it failed, or did not end within the limit; with the end of what it said.
    """
    words = [str(word) for word in command]
    try:
        process: subprocess.Popen[str] = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
    except FileNotFoundError as err:
        raise HarnessError(f"{words[0]} is not on this machine") from err
    with process:
        try:
            stdout, stderr = process.communicate(timeout=limit.s)
        except subprocess.TimeoutExpired as err:
            _end(process)
            raise HarnessError(f"{' '.join(words)}: not done within {limit.s:.0f} s ({limit.reason})") from err
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise HarnessError(f"{' '.join(words)}: status {process.returncode}: {(stdout + stderr)[-2000:].strip()}")
    return stdout


def _end(process: "subprocess.Popen[str]") -> None:
    """End a command with all that it started. It is asked first: a compiler's driver removes its folder, a builder its mounts."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=Limit.INTERRUPTED.s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@dataclass
class Machine:
    """
    One machine.

    Owns: a network namespace, and the process tree in it; `stop` ends both.
    """

    name: str
    address: str
    folder: Path
    """Of this machine: logs, and what is mounted over its system folders."""
    own_folders: tuple[str, ...] = ()
    """Absolute paths that the machine has its own of, such as /run."""
    pid: int = 0
    """Of its process 1, as seen from here."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def namespace(self) -> str:
        return f"{PREFIX}{self.name}"

    @property
    def socket(self) -> Path:
        return self.folder / "init.sock"

    def inside(self, path: str) -> Path:
        """Where a file of the machine's own folders is, from here."""
        for own in self.own_folders:
            if path == own or path.startswith(f"{own}/"):
                return self.folder / "root" / own.strip("/") / path[len(own) :].lstrip("/")
        return Path(path)

    def start(self) -> None:
        """Start process 1 in new namespaces. Blocks: up to Limit.MACHINE."""
        binds = []
        for own in self.own_folders:
            source = self.folder / "root" / own.strip("/")
            source.mkdir(parents=True, exist_ok=True)
            binds.append(f"{source}={own}")
        self.socket.unlink(missing_ok=True)
        log_path = self.folder / "init.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/{self.namespace}"),
                    *(
                        "unshare",
                        "--mount",
                        "--pid",
                        "--fork",
                        "--kill-child",
                        "--mount-proc",
                        "--propagation",
                        "slave",
                    ),
                    *(sys.executable, str(INIT), str(self.socket), *binds),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _STARTED.append(self._process)
        self.pid = self._process.pid
        deadline = time.monotonic() + Limit.MACHINE.s
        while not self.alive():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise HarnessError(f"machine {self.name} did not start: {log_path.read_text()[-2000:]}")
            time.sleep(POLL_S)

    def alive(self) -> bool:
        """Whether its process 1 answers."""
        try:
            self.ask({"list": True})
        except OSError:
            return False
        return True

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """
        Ask process 1; see `machine_init`. Blocks: up to Limit.COMMAND.

        Raises:
            OSError: nobody answers.
            HarnessError: it refused.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(Limit.COMMAND.s)
            connection.connect(str(self.socket))
            connection.sendall(json.dumps(request).encode())
            answer: dict[str, Any] = json.loads(connection.recv(1 << 16))
        if "error" in answer:
            raise HarnessError(f"machine {self.name}: {answer['error']}")
        return answer

    def start_program(self, name: str, *command: str | Path) -> None:
        """Start a program in the machine; its output goes to `log(name)`."""
        words = [str(word) for word in command]
        self.ask({"start": name, "command": words, "log": str(self.log(name))})

    def stop_program(self, name: str, *, with_signal: int = signal.SIGTERM, within_s: float = 10.0) -> None:
        """Stop a program, with SIGKILL after `within_s`."""
        self.ask({"stop": name, "signal": int(with_signal), "within_s": within_s})

    def programs(self) -> dict[str, int]:
        """By name: the process ids, in the machine, of the programs that live."""
        return self.ask({"list": True})

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def exec(self, *command: str | Path, limit: Limit = Limit.COMMAND) -> str:
        """Run a command in the machine's network and mounts."""
        init = self._init_pid()
        return run("nsenter", f"--net=/proc/{init}/ns/net", f"--mount=/proc/{init}/ns/mnt", *command, limit=limit)

    def _init_pid(self) -> int:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        if not children:
            raise HarnessError(f"machine {self.name} is not running")
        return int(children[0])

    def stop(self) -> None:
        """End the machine: its process 1, and with it all that runs there. Blocks: up to Limit.STOP."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError, HarnessError, FileNotFoundError):
                os.kill(self._init_pid(), signal.SIGKILL)
            deadline = time.monotonic() + Limit.STOP.s
            while _runs(self.pid, self._process):
                if time.monotonic() > deadline:
                    raise HarnessError(f"machine {self.name} (process {self.pid}) does not end")
                time.sleep(POLL_S)
        self.pid = 0


def _runs(pid: int, process: subprocess.Popen[bytes] | None) -> bool:
    if process is not None:
        return process.poll() is None
    return Path(f"/proc/{pid}").exists()


def make_network(control: Machine, others: Sequence[Machine]) -> None:
    """Namespaces, the bridge in the control machine's, and a link to it from every machine and from here."""
    for each in (control, *others):
        run("ip", "netns", "add", each.namespace)
        run("ip", "-n", each.namespace, "link", "set", "lo", "up")
        run("ip", "netns", "exec", each.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    inside = ("ip", "-n", control.namespace)
    run(*inside, "link", "add", BRIDGE, "type", "bridge")
    run(*inside, "addr", "add", f"{control.address}/{NETWORK_BITS}", "dev", BRIDGE)
    run(*inside, "link", "set", BRIDGE, "up")
    for each in others:
        run(*inside, "link", "add", each.name, "type", "veth", "peer", "name", "eth0", "netns", each.namespace)
        run(*inside, "link", "set", each.name, "master", BRIDGE, "up")
        run("ip", "-n", each.namespace, "addr", "add", f"{each.address}/{NETWORK_BITS}", "dev", "eth0")
        run("ip", "-n", each.namespace, "link", "set", "eth0", "up")
        # Addresses of Services are on no link; without a way out the kernel refuses them before kube-proxy's rules see them.
        run("ip", "-n", each.namespace, "route", "add", "default", "via", control.address)
    run(*inside, "link", "add", "host", "type", "veth", "peer", "name", HOST_LINK, "netns", "1")
    run(*inside, "link", "set", "host", "master", BRIDGE, "up")
    run("ip", "addr", "add", f"{HOST_ADDRESS}/{NETWORK_BITS}", "dev", HOST_LINK)
    run("ip", "link", "set", HOST_LINK, "up")


def route(machines: Sequence[Machine], destination: str, via: Machine) -> None:
    """Let every machine but `via` reach a subnet through it."""
    for each in machines:
        if each is not via:
            run("ip", "-n", each.namespace, "route", "add", destination, "via", via.address)


def set_link(control: Machine, other: Machine, state: str) -> None:
    """Take the link between a machine and the others "down", or "up" again. Nobody hears that the machine has ended."""
    run("ip", "-n", control.namespace, "link", "set", other.name, state)


def remove_network(names: Sequence[str]) -> None:
    """Delete the namespaces of these machines, and with them their links, and ours. Those that are gone are no error."""
    for name in names:
        if Path(f"/run/netns/{PREFIX}{name}").exists():
            run("ip", "netns", "del", f"{PREFIX}{name}")
    if Path(f"/sys/class/net/{HOST_LINK}").exists():
        run("ip", "link", "del", HOST_LINK)
