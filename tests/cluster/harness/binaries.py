"""
The whole of: the programs of the cluster, built from their Go modules and kept in a cache.

Called from: `built`, and the chart's tests (helm). The key of the cache is the hash of a module's go.mod and go.sum, so that a new
version is a new folder. Must never: write a binary in place; a build that was cut off leaves nothing.
"""

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

from cluster.harness.limits import Limit, cache_folder
from cluster.harness.machine import HarnessError, run

MODULES: Final = Path(__file__).parents[1] / "modules"
PROGRAMS: Final = {
    "kubernetes": ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubectl", "kubelet"),
    "etcd": ("etcd",),
    "coredns": ("coredns",),
    "helm": ("helm",),
    "kwok": ("kwok",),
    "pause": ("pause",),
}
"""By folder under modules/: the programs that are built there."""
_PACKAGES: Final = {"etcd": ("go.etcd.io/etcd/server/v3",), "pause": (".",)}
"""Where the package's last word is not the program's name."""


def folder(module: str) -> Path:
    """Where the programs of a module are, or would be."""
    digest = hashlib.sha256()
    for each in sorted((MODULES / module).iterdir()):
        digest.update(each.read_bytes())
    return cache_folder() / "bin" / f"{module}-{digest.hexdigest()[:16]}"


def program(name: str) -> Path:
    """
    A program, built when it is not there. Blocks: up to Limit.BUILD.

    Raises:
        HarnessError: there is no Go, or it does not build.
    """
    module = next(module for module, names in PROGRAMS.items() if name in names)
    path = folder(module) / name
    if not path.exists():
        build(module)
    return path


def build(module: str) -> Path:
    """Build all programs of a module; their folder."""
    target = folder(module)
    if target.exists():
        return target
    if shutil.which("go") is None:
        raise HarnessError("go is not on this machine: the programs of the cluster are built with it (1.24 or newer)")
    target.parent.mkdir(parents=True, exist_ok=True)
    source = MODULES / module
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -trimpath -buildvcs=false"}
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        run(
            *("go", "build", "-ldflags", f"-s -w {_version_flags(source)}", "-o", f"{made}/"),
            *(_PACKAGES.get(module) or _tools(source)),
            limit=Limit.BUILD,
            cwd=source,
            env=environment,
        )
        built = sorted(Path(made).iterdir())
        # A package that is called otherwise (server/v3) gives the binary its own last word.
        if module == "etcd":
            built[0].rename(Path(made) / "etcd")
        shutil.move(made, target)
        Path(made).mkdir()
    target.chmod(0o755)
    return target


def _tools(source: Path) -> tuple[str, ...]:
    text = (source / "go.mod").read_text()
    found = re.search(r"^tool \(\n(.*?)^\)", text, flags=re.MULTILINE | re.DOTALL)
    listed = found[1].split() if found else re.findall(r"^tool (\S+)$", text, flags=re.MULTILINE)
    return tuple(listed)


def _version_flags(source: Path) -> str:
    """What makes Kubernetes know its own version; a build from a git tree would take it from there."""
    found = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\.\d+)", (source / "go.mod").read_text())
    if found is None:
        return ""
    at = "-X k8s.io/component-base/version"
    return f"{at}.gitVersion=v{found[1]} {at}.gitMajor={found[2]} {at}.gitMinor={found[3]}"
