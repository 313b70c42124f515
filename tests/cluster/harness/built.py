"""
The whole of: the provider `built`: Kubernetes made of programs that were built here, on machines in namespaces of this one.

Called from: `clusters`. Needs root, Go, and the Debian packages of `packages`.
Must never: leave anything when it is taken down but its cache; or take down what it did not start.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from cluster.harness import binaries, control_plane, images, node, packages, pki, progress
from cluster.harness.limits import Limit, cache_folder, state_folder
from cluster.harness.machine import HarnessError, Machine, make_network, remove_network, route, run, set_link
from cluster.harness.node import CONTAINERD_SOCKET

CONTROL: Final = "control"
NODES: Final = ("node1", "node2")
ADDRESSES: Final = {"control": "10.77.0.1", "node1": "10.77.0.11", "node2": "10.77.0.12"}
VOLUMES: Final = "/srv/pillion-test"
"""A folder that all nodes see as the same: what a shared file system is in a real cluster."""
FREE_DISK_BYTES: Final = 12 * 2**30
POLL_S: Final = 0.2


class Built:
    """
    A cluster of this provider.

    Owns: the machines. `up` makes them, `down` ends them, also those of a process that died.
    """

    @property
    def name(self) -> str:
        return "built"

    @property
    def nodes(self) -> Sequence[str]:
        return NODES

    def __init__(self) -> None:
        self.folder = state_folder()
        self.machines = {
            name: Machine(
                name,
                ADDRESSES[name],
                self.folder / name,
                own_folders=() if name == CONTROL else node.OWN_FOLDERS,
            )
            for name in (CONTROL, *NODES)
        }
        for name, pid in self._recorded().items():
            self.machines[name].pid = pid

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "pki" / "admin.kubeconfig"

    @property
    def kubectl(self) -> Path:
        return binaries.program("kubectl")

    def is_up(self) -> bool:
        """Whether a cluster of an earlier call is there and answers."""
        return self.kubeconfig.exists() and all(each.pid and each.alive() for each in self.machines.values())

    def up(self) -> None:
        """Make the cluster: control plane, two nodes, DNS. Blocks: minutes, or an hour with an empty cache; says where it is."""
        self._programs()
        self.down()
        with progress.step("starting the control plane and two nodes"):
            self._start()

    def prepare(self) -> None:
        """Compile, install and build what `up` and `build_and_load` need, without a cluster. Blocks: minutes, or an hour with an empty cache."""
        self._programs()
        images.ours()

    def _programs(self) -> None:
        packages.require()
        self._check()
        binaries.build(binaries.CLUSTER)
        images.of_a_node()

    def _start(self) -> None:
        """Start machines, network and programs, until DNS answers."""
        for each in self.machines.values():
            each.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        control, *others = self.machines.values()
        make_network(control, others)
        for number, each in enumerate(others, start=1):
            route([*self.machines.values()], node.pod_subnet(number), each)
        for each in self.machines.values():
            each.start()
            self._record()
        authority = pki.Authority(self.folder / "pki")
        for number, each in enumerate(others, start=1):
            node.start_containerd(each, number)
        control_plane.start(control, authority)
        for each in others:
            self._until(each.inside(node.CONTAINERD_SOCKET).exists, Limit.NODE, f"containerd of {each.name}")
        self.load(images.of_a_node())
        self._system_accounts()
        for each in others:
            node.configure(each, authority, server=control_plane.server(control))
            node.start_kubelet(each)
        self._until(self._nodes_ready, Limit.NODE, f"nodes to be Ready; logs in {self.folder}")
        self.run_kubectl("apply", "-f", str(Path(__file__).with_name("dns.yaml")))
        self.run_kubectl(
            *("rollout", "status", "deployment/coredns", "-n", "kube-system", f"--timeout={Limit.ADDONS.s:.0f}s"),
            limit=Limit.ADDONS,
        )

    def down(self) -> None:
        """Take the cluster down. What is not there is no error. Blocks: up to Limit.STOP a machine, and while its disks are removed."""
        # The nodes' images are gigabytes, which a file system that discards what it frees removes in minutes.
        with progress.step("taking the cluster down") if self.folder.exists() else contextlib.nullcontext():
            self._down()

    def _down(self) -> None:
        for each in reversed(self.machines.values()):
            each.stop()
        remove_network([CONTROL, *NODES])
        node.remove_cgroups(list(NODES))
        if self.folder.exists():
            # Mounts of a machine went with it; a folder that is still a mount is nobody's to remove.
            shutil.rmtree(self.folder)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(VOLUMES)

    def load(self, tags: Sequence[str]) -> None:
        """Bring images to every node."""
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            for number, tag in enumerate(tags, start=1):
                with progress.step(f"bringing {tag} to the nodes ({number} of {len(tags)})"):
                    path = images.archive(tag, Path(folder))
                    with ThreadPoolExecutor(max_workers=len(NODES)) as pool:
                        list(pool.map(node.import_image, [self.machines[name] for name in NODES], [path] * len(NODES)))
                    path.unlink()

    def build_and_load(self) -> None:
        """Build the product's images and bring them to every node, where they are not there already."""
        digest = images.source_digest()
        stamp = self.folder / "images.digest"
        if not stamp.exists() or stamp.read_text() != digest:
            self.load(images.ours())
            stamp.write_text(digest)

    def volume(self, name: str) -> Path:
        """A folder that is the same on every node; it is there."""
        path = Path(VOLUMES) / name
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)
        return path

    @contextlib.contextmanager
    def small_volume(self, node: str, folder: Path, mib: int) -> Iterator[None]:
        """Mount a file system of so many MiB over a folder of `volume`, on one node."""
        machine = self.machines[node]
        machine.exec("mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0777", "small", folder)
        try:
            yield
        finally:
            machine.exec("umount", folder)

    def kill(self, node: str, container_id: str) -> None:
        """SIGKILL to the first process of a container, as the kernel would send it."""
        socket = self.machines[node].inside(CONTAINERD_SOCKET)
        identity = container_id.removeprefix("containerd://")
        run("ctr", "--address", socket, "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", identity)

    @contextlib.contextmanager
    def lost(self, node_name: str) -> Iterator[None]:
        """A node has lost its link and its power while the block runs; then it boots, with its disk as it was."""
        control, machine = self.machines[CONTROL], self.machines[node_name]
        # The link first: a machine that has lost its power says no word to those it was connected to.
        set_link(control, machine, "down")
        machine.stop()
        try:
            yield
        finally:
            for own in node.VOLATILE_FOLDERS:
                shutil.rmtree(machine.inside(own))
            node.remove_cgroups([node_name])
            machine.start()
            self._record()
            set_link(control, machine, "up")
            node.start_containerd(machine, NODES.index(node_name) + 1)
            self._until(machine.inside(CONTAINERD_SOCKET).exists, Limit.NODE, f"containerd of {node_name}")
            node.start_kubelet(machine)
            self._until(self._nodes_ready, Limit.NODE, f"nodes to be Ready; logs in {self.folder}")

    def run_kubectl(self, *arguments: str, limit: Limit = Limit.COMMAND) -> str:
        return run(self.kubectl, f"--kubeconfig={self.kubeconfig}", *arguments, limit=limit)

    def _nodes_ready(self) -> bool:
        listed = json.loads(self.run_kubectl("get", "nodes", "-o", "json"))["items"]
        ready = [
            item
            for item in listed
            for condition in item["status"]["conditions"]
            if condition["type"] == "Ready" and condition["status"] == "True"
        ]
        return len(ready) == len(NODES)

    def _system_accounts(self) -> None:
        """What kubeadm would grant: kube-proxy has its role only where somebody binds it."""
        self.run_kubectl(
            *("create", "clusterrolebinding", "pillion-test-proxy", "--clusterrole=system:node-proxier"),
            "--user=system:kube-proxy",
        )

    def _until(self, predicate: object, limit: Limit, what: str) -> None:
        deadline = time.monotonic() + limit.s
        while True:
            with contextlib.suppress(HarnessError):
                if callable(predicate) and predicate():
                    return
            if time.monotonic() > deadline:
                raise HarnessError(f"waited {limit.s:.0f} s for {what} ({limit.reason})")
            time.sleep(POLL_S)

    def _check(self) -> None:
        if os.geteuid() != 0:
            raise HarnessError("the built cluster needs root: namespaces, mounts and containers are made")
        cache_folder().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache_folder()).free
        if free < FREE_DISK_BYTES:
            raise HarnessError(f"{free / 2**30:.0f} GiB of disk are free; {FREE_DISK_BYTES / 2**30:.0f} are needed")

    def _record(self) -> None:
        """For `down` in another process: who the machines are, told apart from a later process of the same id."""
        entries = {name: [each.pid, _started(each.pid)] for name, each in self.machines.items() if each.pid}
        (self.folder / "machines.json").write_text(json.dumps(entries))

    def _recorded(self) -> dict[str, int]:
        path = self.folder / "machines.json"
        if not path.exists():
            return {}
        entries: dict[str, list[int]] = json.loads(path.read_text())
        return {name: pid for name, (pid, started) in entries.items() if _started(pid) == started}


def _started(pid: int) -> int:
    """When a process started, in clock ticks since boot; -1 for none. Source: proc(5), field 22 of stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(text.rpartition(")")[2].split()[19])
