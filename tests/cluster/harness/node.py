"""
The whole of: what makes a machine a node: containerd, the pod network, kubelet and kube-proxy, with the settings that they need
inside a machine of the harness.

Called from: `built`.
Must never: use another machine's folders; /run, /var/lib/kubelet and the rest are each node's own.
"""

import json
import shutil
from pathlib import Path
from typing import Final

from cluster.harness import binaries, pki
from cluster.harness.limits import Limit
from cluster.harness.machine import Machine, run

OWN_FOLDERS: Final = ("/run", "/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/log", "/etc/cni/net.d")
VOLATILE_FOLDERS: Final = ("/run",)
"""Of those, what a boot empties."""
CONTAINERD_SOCKET: Final = "/run/containerd/containerd.sock"
PAUSE_IMAGE: Final = "localhost/pillion-test/pause:1"
CLUSTER_DNS: Final = "10.79.0.10"
POD_SUBNET: Final = "10.78.0.0/16"
CGROUPS: Final = Path("/sys/fs/cgroup")
KUBECONFIG: Final = "kubelet.kubeconfig"

CONTAINERD: Final = f"""\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  # The capability to lower a score is missing on some build machines; without this every sandbox dies there.
  restrict_oom_score_adj = true
  sandbox_image = "{PAUSE_IMAGE}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
"""


def pod_subnet(number: int) -> str:
    """The pods of the node of that number, from 1."""
    return f"10.78.{number}.0/24"


def start_containerd(node: Machine, number: int) -> None:
    """Start containerd, with a network for pods: routed, so that a Service answers a pod of the same node too."""
    (node.folder / "containerd.toml").write_text(CONTAINERD)
    network = {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": False,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": pod_subnet(number)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
    node.inside("/etc/cni/net.d").joinpath("10-pods.conflist").write_text(json.dumps(network))
    node.start_program("containerd", "containerd", "--config", node.folder / "containerd.toml")


def configure(node: Machine, authority: pki.Authority, *, server: str) -> None:
    """Write what the kubelet and kube-proxy read."""
    # No resolver of this machine: pods resolve names of the cluster only.
    resolv = node.folder / "resolv.conf"
    resolv.write_text("")
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority.path)},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.namespace}",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "clusterDNS": [CLUSTER_DNS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(resolv),
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        # Disk and memory are the whole machine's, shared with whatever else runs there.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "maxPods": 110,
        "enableControllerAttachDetach": True,
    }
    (node.folder / "kubelet.json").write_text(json.dumps(config))
    kubelet = authority.kubeconfig(node.name, f"system:node:{node.name}", server=server, groups=["system:nodes"])
    shutil.copy(kubelet, node.folder / KUBECONFIG)
    proxy = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {
            "kubeconfig": str(authority.kubeconfig(f"{node.name}-proxy", "system:kube-proxy", server=server))
        },
        "mode": "iptables",
        "clusterCIDR": POD_SUBNET,
        "hostnameOverride": node.name,
        # These are limits of the kernel as a whole, not of a namespace.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
    (node.folder / "kube-proxy.json").write_text(json.dumps(proxy))


def start_kubelet(node: Machine) -> None:
    """Start the kubelet and kube-proxy; the node registers itself, or is Ready again."""
    for controller in _controllers():
        (controller / node.namespace).mkdir(exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):
            if (controller / name).exists():
                (controller / node.namespace / name).write_text((controller / name).read_text())
    node.start_program(
        "kubelet",
        binaries.program("kubelet"),
        f"--kubeconfig={node.folder / KUBECONFIG}",
        f"--config={node.folder / 'kubelet.json'}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
    )
    node.start_program("kube-proxy", binaries.program("kube-proxy"), f"--config={node.folder / 'kube-proxy.json'}")


def import_image(node: Machine, archive: Path) -> None:
    """Bring an image archive to the node's containerd."""
    socket = node.inside(CONTAINERD_SOCKET)
    run(
        "ctr",
        "--address",
        socket,
        "--namespace",
        "k8s.io",
        "images",
        "import",
        archive,
        limit=Limit.IMAGE,
    )


def remove_cgroups(names: list[str]) -> None:
    """Remove the control groups of machines that are gone, the innermost first."""
    for controller in _controllers():
        for name in names:
            top = controller / f"pillion-{name}"
            if top.exists():
                for folder in sorted((each for each in top.rglob("*") if each.is_dir()), reverse=True):
                    folder.rmdir()
                top.rmdir()


def _controllers() -> list[Path]:
    """Where control groups are made: a folder for each controller under cgroup v1, one for all under v2."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [each for each in CGROUPS.iterdir() if (each / "cgroup.procs").exists()]
