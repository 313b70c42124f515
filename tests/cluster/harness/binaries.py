"""
The whole of: the programs of the cluster, and others that tests need, built from their Go modules and kept in a cache.

Called from: `built`, `images`, the chart's tests (helm), and those of object stores (versitygw). The key of the cache is the hash of a module's folder, so that a new
version is a new folder. Programs are built one by one, each within a bound of its own, and each is kept as soon as it is there; a
build that its bound has ended goes on at the next try where it was, as Go keeps each package that it has compiled (`go env GOCACHE`).
Must never: write a binary in place; a build that was cut off leaves nothing there.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cluster.harness import progress
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
    "training-operator": ("training-operator",),
    "kueue": ("kueue",),
    "kuberay": ("ray-operator",),
    "cert-manager": ("cert-manager",),
    "versitygw": ("versitygw",),
}
"""By folder under modules/: the programs that are built there."""
CLUSTER: Final = tuple(name for each in ("kubernetes", "etcd", "coredns", "helm", "pause") for name in PROGRAMS[each])
"""The programs that every cluster needs."""
_PACKAGES: Final = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "pause": ".",
    "training-operator": "github.com/kubeflow/training-operator/cmd/training-operator.v1",
    "cert-manager": ".",
}
"""Where the package's last word is not the program's name."""


def folder(module: str) -> Path:
    """Where the programs of a module are, or would be."""
    digest = hashlib.sha256()
    for each in sorted((MODULES / module).iterdir()):
        digest.update(each.read_bytes())
    return cache_folder() / "bin" / f"{module}-{digest.hexdigest()[:16]}"


def place(name: str) -> Path:
    """Where a program is, or would be."""
    return folder(_module(name)) / name


def program(name: str) -> Path:
    """
    A program, built when it is not there. Blocks: up to Limit.BUILD.

    Raises:
        HarnessError: there is no Go, or it does not build.
    """
    build([name])
    return place(name)


def build(names: Iterable[str]) -> None:
    """
    Build those of these programs that are not there, one after another, and say which. Blocks: up to Limit.BUILD for each.

    Raises:
        HarnessError: there is no Go, or one does not build; those before it are kept.
    """
    missing = [name for name in names if not place(name).exists()]
    if missing and shutil.which("go") is None:
        raise HarnessError(f"go is not on this machine: {missing[0]} is built with it (1.26 or newer)")
    for number, name in enumerate(missing, start=1):
        with progress.step(f"building {name} from its Go module ({number} of {len(missing)})"):
            _build(name)


def source(name: str, path: str) -> Path:
    """
    The folder of an upstream's module, at the version of a program: its CRDs and manifests. Blocks: up to Limit.BUILD.

    Args:
        name: of the program.
        path: of the module, as in its go.mod.
    """
    said = run("go", "mod", "download", "-json", path, limit=Limit.BUILD, cwd=MODULES / _module(name))
    return Path(json.loads(said)["Dir"])


def _build(name: str) -> None:
    target, source = place(name), MODULES / _module(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -trimpath -buildvcs=false"}
    with tempfile.TemporaryDirectory(dir=target.parents[1]) as made:
        run(
            # No debug information: the linker would drop it, and making it takes 8 % of a build (helm's: 2 min 0 s for 2 min 11 s, two cores).
            *("go", "build", "-gcflags=all=-dwarf=false"),
            *("-ldflags", f"-s -w {_version_flags(source)}", "-o", f"{made}/{name}"),
            _PACKAGES.get(name) or _tool(source, name),
            limit=Limit.BUILD,
            cwd=source,
            env=environment,
        )
        os.replace(f"{made}/{name}", target)


def _module(name: str) -> str:
    return next(module for module, names in PROGRAMS.items() if name in names)


def _tool(source: Path, name: str) -> str:
    """The package of the module's tools whose last word is the program's name."""
    text = (source / "go.mod").read_text()
    found = re.search(r"^tool \(\n(.*?)^\)", text, flags=re.MULTILINE | re.DOTALL)
    listed = found[1].split() if found else re.findall(r"^tool (\S+)$", text, flags=re.MULTILINE)
    return next(str(each) for each in listed if each.rpartition("/")[2] == name)


def _version_flags(source: Path) -> str:
    """What makes Kubernetes know its own version; a build from a git tree would take it from there."""
    found = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\.\d+)", (source / "go.mod").read_text())
    if found is None:
        return ""
    at = "-X k8s.io/component-base/version"
    return f"{at}.gitVersion=v{found[1]} {at}.gitMajor={found[2]} {at}.gitMinor={found[3]}"
