"""
The whole of: the images of a built cluster: their bases from Debian packages, ours from the Dockerfile, without a registry.

Called from: `built`, and the tests with controllers of other projects. `python` stands in for the official Python image, `torch` is the same with Debian's CPU build of torch, so
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

from cluster.harness import binaries, progress
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
        with (
            progress.step(f"bootstrapping the base image with Python from Debian {SUITE}"),
            tempfile.TemporaryDirectory(dir=_room()) as folder,
        ):
            root = Path(folder) / "root"
            run(
                *("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", SUITE, root),
                limit=Limit.BOOTSTRAP,
            )
            for cache in ("var/lib/apt/lists", "var/cache/apt"):
                shutil.rmtree(root / cache)
            run("tar", "-C", root, "-cf", Path(folder) / "root.tar", ".", limit=Limit.IMAGE)
            from_text(_PYTHON, PYTHON_BASE, {"root.tar": Path(folder) / "root.tar"})
    if not exists(TORCH_BASE):
        with progress.step("building the base image with torch"):
            from_text(f"FROM {PYTHON_BASE}\n{_TORCH}", TORCH_BASE)


def of_a_node() -> tuple[str, ...]:
    """Build what a node needs before the first pod: tags."""
    for tag, name in ((PAUSE_IMAGE, "pause"), (COREDNS_IMAGE, "coredns")):
        if not exists(tag) or not binaries.place(name).exists():
            from_text(
                f'FROM scratch\nCOPY {name} /{name}\nENTRYPOINT ["/{name}"]\n', tag, {name: binaries.program(name)}
            )
    return PAUSE_IMAGE, COREDNS_IMAGE


def of_a_program(name: str, files: Mapping[str, str] | None = None) -> str:
    """
    Build the image of a controller of another project, where it is not there: the tag.

    Args:
        name: of a program of `binaries`; it is /manager in the image, as it is in most of theirs.
        files: text by absolute path in the image.
    """
    path = binaries.program(name)
    sources: dict[str, str | Path] = {
        name: path,
        **{f"file{number}": text for number, text in enumerate((files or {}).values())},
    }
    copies = "".join(f"COPY file{number} {target}\n" for number, target in enumerate(files or {}))
    recipe = f'FROM scratch\nCOPY {name} /manager\n{copies}USER 65532:65532\nENTRYPOINT ["/manager"]\n'
    tag = _tag(name, path.parent.name, recipe, *(files or {}).values())
    if not exists(tag):
        with progress.step(f"building the image of {name}"):
            from_text(recipe, tag, sources)
    return tag


def of_a_recipe(name: str, recipe: str) -> str:
    """Build an image from a Dockerfile's text, where it is not there: the tag, which changes with the text."""
    tag = _tag(name, recipe)
    if not exists(tag):
        with progress.step(f"building the image {name}"):
            from_text(recipe, tag)
    return tag


def ours() -> tuple[str, ...]:
    """Build the product's images from the repository's Dockerfile: tags. Layers of an earlier build are used again."""
    bases()
    for number, (tag, target, base) in enumerate(
        ((OPERATOR_IMAGE, "operator", PYTHON_BASE), (SIDECAR_IMAGE, "sidecar", TORCH_BASE)), start=1
    ):
        with progress.step(f"building the image of the {target} ({number} of 2)"):
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


def from_text(recipe: str, tag: str, files: Mapping[str, str | Path] | None = None) -> None:
    """Build an image from a Dockerfile's text, in a folder with these files: text, or a path to copy."""
    with tempfile.TemporaryDirectory(dir=_room()) as folder:
        context = Path(folder)
        for name, content in (files or {}).items():
            if isinstance(content, Path):
                _bring(content, context / name)
            else:
                (context / name).write_text(content)
        (context / "Dockerfile").write_text(recipe)
        build(context / "Dockerfile", context, tag, arguments={"PIP_CERT": CERTIFICATES})


def _bring(source: Path, target: Path) -> None:
    """Link a file where that can be done: a root file system is large, and read once."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _room() -> str:
    """A folder on the disk of the cache: a root file system is too much for a /tmp in memory."""
    folder = cache_folder() / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TMPDIR", str(folder))
    return str(folder)
