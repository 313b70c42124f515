"""
The whole of: the images of a built cluster: their bases from Debian packages, ours from the Dockerfile, without a registry.

Called from: `built`. `python` stands in for the official Python image, `torch` is the same with Debian's CPU build of torch, so
that the cluster's tests run the oldest torch that is supported, and the local ones the newest.
Must never: pull. What a build needs beyond its base comes through the package managers' own settings.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cluster.harness import binaries
from cluster.harness.limits import ROOT, Limit, cache_folder
from cluster.harness.machine import run
from cluster.harness.node import PAUSE_IMAGE

SUITE: Final = "trixie"
COREDNS_IMAGE: Final = "localhost/pillion-test/coredns:1"
SIDECAR_IMAGE: Final = "localhost/pillion/sidecar:test"
OPERATOR_IMAGE: Final = "localhost/pillion/operator:test"
CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"
"""What this machine trusts, in the same place in a build."""
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PACKAGES: Final = "python3,python3-venv,ca-certificates"


_PYTHON: Final = f'FROM scratch\nADD root.tar /\nENV PATH={_PATH}\nCMD ["python3"]\n'
_TORCH: Final = """\
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-torch \\
    && rm -rf /var/lib/apt/lists /var/cache/apt
# Debian's torch has no libuv, and three places of 2.6 ask for it whatever USE_LIBUV says: the one thing that is mended here.
RUN cd /usr/lib/python3/dist-packages/torch/distributed \\
    && sed -i 's/multi_tenant=True,/multi_tenant=True, use_libuv=False,/' elastic/rendezvous/*.py \\
    && sed -i 's/^            is_master=False,/            is_master=False, use_libuv=False,/' rendezvous.py
"""


def _tag(name: str, *recipe: str) -> str:
    """A tag that changes with what the image is made of."""
    return f"localhost/pillion-test/{name}:{hashlib.sha256(' '.join(recipe).encode()).hexdigest()[:12]}"


PYTHON_BASE: Final = _tag("python", SUITE, _PACKAGES, _PYTHON)
TORCH_BASE: Final = _tag("torch", PYTHON_BASE, _TORCH)


def _buildah() -> list[str]:
    storage = cache_folder() / "images"
    return ["buildah", "--root", str(storage), "--runroot", "/run/pillion-images", "--storage-driver", "overlay"]


def build(
    dockerfile: Path, context: Path, tag: str, *, target: str = "", arguments: Mapping[str, str] | None = None
) -> None:
    """Build an image in a plain chroot: no daemon, no user namespace. Blocks: up to Limit.IMAGE."""
    options = ["--isolation", "chroot", "--pull-never", "--layers", "--file", str(dockerfile), "--tag", tag]
    options += ["--target", target] if target else []
    for name, value in (arguments or {}).items():
        options += ["--build-arg", f"{name}={value}"]
    # A machine behind a gateway trusts more than a fresh image does, and has package settings of its own.
    options += ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    run(*_buildah(), "bud", *options, str(context), limit=Limit.IMAGE)


def exists(tag: str) -> bool:
    """Whether the image was built before."""
    return tag in run(*_buildah(), "images", "--format", "{{.Name}}:{{.Tag}}").split()


def archive(tag: str, folder: Path) -> Path:
    """Write an image to a file that containerd imports; the caller removes it."""
    path = folder / f"{tag.replace('/', '_').replace(':', '_')}.tar"
    path.unlink(missing_ok=True)
    run(*_buildah(), "push", tag, f"docker-archive:{path}:{tag}", limit=Limit.IMAGE)
    return path


def bases() -> None:
    """Make the two bases, where they are not there. Blocks: up to Limit.BOOTSTRAP, and two builds."""
    if not exists(PYTHON_BASE):
        with tempfile.TemporaryDirectory(dir=_room()) as folder:
            root = Path(folder) / "root"
            run(
                *("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", SUITE, root),
                limit=Limit.BOOTSTRAP,
            )
            for cache in ("var/lib/apt/lists", "var/cache/apt"):
                shutil.rmtree(root / cache)
            run("tar", "-C", root, "-cf", Path(folder) / "root.tar", ".", limit=Limit.IMAGE)
            _from_text(_PYTHON, Path(folder), PYTHON_BASE)
    if not exists(TORCH_BASE):
        with tempfile.TemporaryDirectory(dir=_room()) as folder:
            _from_text(f"FROM {PYTHON_BASE}\n{_TORCH}", Path(folder), TORCH_BASE)


def of_a_node() -> tuple[str, ...]:
    """Build what a node needs before the first pod: tags."""
    for tag, name in ((PAUSE_IMAGE, "pause"), (COREDNS_IMAGE, "coredns")):
        if not exists(tag) or not binaries.folder(name).exists():
            path = binaries.program(name)
            with tempfile.TemporaryDirectory(dir=_room()) as folder:
                shutil.copy(path, Path(folder) / name)
                _from_text(f'FROM scratch\nCOPY {name} /{name}\nENTRYPOINT ["/{name}"]\n', Path(folder), tag)
    return PAUSE_IMAGE, COREDNS_IMAGE


def ours() -> tuple[str, ...]:
    """Build the product's images from the repository's Dockerfile: tags. Layers of an earlier build are used again."""
    bases()
    for tag, target, base in ((OPERATOR_IMAGE, "operator", PYTHON_BASE), (SIDECAR_IMAGE, "sidecar", TORCH_BASE)):
        build(ROOT / "Dockerfile", ROOT, tag, target=target, arguments={"BASE": base, "PIP_CERT": CERTIFICATES})
    return OPERATOR_IMAGE, SIDECAR_IMAGE


def source_digest() -> str:
    """Of all that goes into our images: the same digest, the same images."""
    digest = hashlib.sha256()
    for top in ("Dockerfile", "requirements", "client", "sidecar", "operator", "examples"):
        path = ROOT / top
        for each in sorted([path] if path.is_file() else path.rglob("*")):
            if each.is_file() and "__pycache__" not in each.parts and "egg-info" not in str(each):
                digest.update(str(each.relative_to(ROOT)).encode() + each.read_bytes())
    return digest.hexdigest()[:16]


def _from_text(text: str, folder: Path, tag: str) -> None:
    (folder / "Dockerfile").write_text(text)
    build(folder / "Dockerfile", folder, tag)


def _room() -> str:
    """A folder on the disk of the cache: a root file system is too much for a /tmp in memory."""
    folder = cache_folder() / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TMPDIR", str(folder))
    return str(folder)
