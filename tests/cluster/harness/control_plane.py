"""
The whole of: etcd, the API server, the controller manager and the scheduler, with the flags that a test cluster needs.

Called from: `built`. Every flag that is not a path says why it is there.
Must never: listen anywhere but in the control machine's own network.
"""

import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from cluster.harness import binaries, pki
from cluster.harness.limits import Limit
from cluster.harness.machine import HarnessError, Machine

SERVICE_SUBNET: Final = "10.79.0.0/16"
API_SERVICE: Final = "10.79.0.1"
PORT: Final = 6443
POLL_S: Final = 0.2


def server(control: Machine) -> str:
    """The API server's address."""
    return f"https://{control.address}:{PORT}"


def start(control: Machine, authority: pki.Authority) -> Path:
    """Start all four; the administrator's kubeconfig. Blocks: up to Limit.CONTROL_PLANE."""
    certificates = authority.folder
    sans = (control.address, API_SERVICE, "127.0.0.1", "localhost", "kubernetes", "kubernetes.default.svc")
    serving, serving_key = authority.issue("apiserver", "kube-apiserver", sans=sans)
    kubelet, kubelet_key = authority.issue("apiserver-kubelet", "kube-apiserver", groups=["system:masters"])
    public, private = pki.service_account_keys(certificates)
    at = server(control)
    admin = authority.kubeconfig("admin", "admin", server=at, groups=["system:masters"])

    control.start_program(
        "etcd",
        binaries.program("etcd"),
        f"--data-dir={control.folder / 'etcd'}",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        # A test cluster does not outlive a power cut.
        "--unsafe-no-fsync",
    )
    control.start_program(
        "kube-apiserver",
        binaries.program("kube-apiserver"),
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={control.address}",
        f"--secure-port={PORT}",
        f"--service-cluster-ip-range={SERVICE_SUBNET}",
        f"--client-ca-file={authority.path}",
        f"--tls-cert-file={serving}",
        f"--tls-private-key-file={serving_key}",
        f"--kubelet-client-certificate={kubelet}",
        f"--kubelet-client-key={kubelet_key}",
        # A node's name is in no DNS here.
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={public}",
        f"--service-account-signing-key-file={private}",
        # Nothing is aggregated; without it controller manager and scheduler complain for ever.
        f"--requestheader-client-ca-file={authority.path}",
        "--requestheader-allowed-names=none",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        # Webhooks are reached by their endpoints: this machine has no kube-proxy.
        "--enable-aggregator-routing",
        "--allow-privileged",
        # Every watch cache holds its lists in memory; two cores have better things to do than profiling.
        "--profiling=false",
    )
    _until_ready(control, authority)
    for name, user in (
        ("kube-controller-manager", "system:kube-controller-manager"),
        ("kube-scheduler", "system:kube-scheduler"),
    ):
        kubeconfig = authority.kubeconfig(name, user, server=at)
        flags = [
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--leader-elect=false",
            "--profiling=false",
        ]
        if name == "kube-controller-manager":
            flags += [
                f"--service-account-private-key-file={private}",
                f"--root-ca-file={authority.path}",
                f"--cluster-signing-cert-file={authority.path}",
                f"--cluster-signing-key-file={authority.key_path}",
                "--use-service-account-credentials",
                # A claim that names its volume is bound in a test's time, too.
                "--pvclaimbinder-sync-period=1s",
                # A lost node is noticed in a test's time, not in a minute.
                "--node-monitor-grace-period=20s",
            ]
        control.start_program(name, binaries.program(name), *flags)
    return admin


def _until_ready(control: Machine, authority: pki.Authority) -> None:
    context = ssl.create_default_context(cafile=str(authority.path))
    # No proxy between us and an address that we made.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    deadline = time.monotonic() + Limit.CONTROL_PLANE.s
    seen = ""
    while time.monotonic() < deadline:
        try:
            with opener.open(f"{server(control)}/readyz", timeout=Limit.MACHINE.s) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError) as err:
            seen = str(err)
        if "kube-apiserver" not in control.programs():
            break
        time.sleep(POLL_S)
    log = control.log("kube-apiserver")
    raise HarnessError(f"the API server is not ready ({seen}); the end of {log}: {log.read_text()[-2000:]}")
