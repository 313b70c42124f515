"""
The whole of: the Debian packages that a built cluster needs, and installing them.

Called from: `built`.
Must never: install anything without saying so.
"""

import os
import shutil
from typing import Final

from cluster.harness import progress
from cluster.harness.limits import Limit
from cluster.harness.machine import HarnessError, run

NEEDED: Final = {
    "containerd": "containerd",
    "runc": "runc",
    "buildah": "buildah",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "/usr/lib/cni/ptp": "containernetworking-plugins",
    "promtool": "prometheus",
}
"""By program: the package that has it."""


def missing() -> list[str]:
    """Packages whose programs are not here."""
    return sorted(
        {
            package
            for program, package in NEEDED.items()
            if not (os.path.exists(program) if program.startswith("/") else shutil.which(program))
        }
    )


def require() -> None:
    """
    Install what is missing. Blocks: up to Limit.PACKAGES.

    Raises:
        HarnessError: this is no Debian, or they cannot be had.
    """
    absent = missing()
    if not absent:
        return
    if shutil.which("apt-get") is None:
        raise HarnessError(f"these packages are needed, and there is no apt-get to install them: {', '.join(absent)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # Daemons that come with a package (containerd, prometheus) are not to start: machines of the harness run their own.
    policy = "/usr/sbin/policy-rc.d"
    had_policy = os.path.exists(policy)
    if not had_policy:
        with open(policy, "w", encoding="ascii") as file:
            file.write("#!/bin/sh\nexit 101\n")
        os.chmod(policy, 0o755)
    try:
        with progress.step(f"installing {', '.join(absent)}"):
            run("apt-get", "update", "-qq", limit=Limit.PACKAGES, env=environment)
            run(
                *("apt-get", "install", "-y", "-qq", "--no-install-recommends", *absent),
                limit=Limit.PACKAGES,
                env=environment,
            )
    finally:
        if not had_policy:
            os.unlink(policy)
