"""
The whole of: the programs of the object stores: versitygw, built from its Go module; Azurite, installed from npm; and s3fs, a reader that
cannot be installed beside the operator. All are kept in the cache that the test cluster's programs are in.

Called from: `servers`, which asks for what is there, and `make object-stores`, which makes it (``python -m support.object_stores.programs``).
Must never: build or download while a test runs: a compiler has no place within a test's bound.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

import pytest

from cluster.harness import binaries, progress
from cluster.harness.limits import ROOT, Limit, cache_folder
from cluster.harness.machine import HarnessError, run

_AZURITE: Final = Path(__file__).with_name("azurite")
_LOCKS: Final = ("package.json", "package-lock.json")
_MAIN: Final = "node_modules/azurite/dist/src/blob/main.js"
_S3FS_LOCK: Final = ROOT / "requirements" / "s3fs.lock"


def versitygw() -> Path:
    """
    The program. Where it is not, the test is skipped; in CI it fails.
    """
    return _there(binaries.place("versitygw"))


def azurite() -> Path:
    """
    The script for node. Where it is not, the test is skipped; in CI it fails.
    """
    if shutil.which("node") is None:
        _without("node is not on this machine")
    return _there(_azurite_folder() / _MAIN)


def s3fs() -> Path:
    """
    The folder that a process has in front on its PYTHONPATH. Where it is not, the test is skipped; in CI it fails.
    """
    return _there(_s3fs_folder())


def make() -> None:
    """
    Build and install what is not there yet, and say so. Blocks: up to Limit.BUILD, Limit.NODE_PACKAGES and Limit.PYTHON_PACKAGES.

    Raises:
        HarnessError: Go or npm is not there, or the module or a package is not to be had.
    """
    _make_s3fs()
    binaries.build(["versitygw"])
    _make_azurite()


def _make_s3fs() -> None:
    target = _s3fs_folder()
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress.step("installing s3fs into a folder of its own"),
        tempfile.TemporaryDirectory(dir=target.parent) as made,
    ):
        installed = Path(made) / "s3fs"
        # Wheels alone: no package may run a script.
        options = ("--only-binary", ":all:", "--no-deps", "--require-hashes", "--requirements", _S3FS_LOCK)
        uv = Path(sys.executable).with_name("uv")
        run(
            uv,
            *("pip", "install", "--quiet", "--python", sys.executable, "--target", installed, *options),
            limit=Limit.PYTHON_PACKAGES,
        )
        os.rename(installed, target)


def _make_azurite() -> None:
    target = _azurite_folder()
    if (target / _MAIN).exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress.step("installing Azurite from npm"),
        tempfile.TemporaryDirectory(dir=target.parent) as made,
    ):
        for name in _LOCKS:
            shutil.copy(_AZURITE / name, made)
        # No package may run a script: what is installed is what the hashes say.
        run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", limit=Limit.NODE_PACKAGES, cwd=made)
        os.makedirs(target, exist_ok=True)
        os.rename(made, target)
        # The context manager removes its folder, so it has to be there.
        os.mkdir(made)


def _azurite_folder() -> Path:
    digest = hashlib.sha256()
    for name in _LOCKS:
        digest.update((_AZURITE / name).read_bytes())
    return cache_folder() / "bin" / f"azurite-{digest.hexdigest()[:16]}"


def _s3fs_folder() -> Path:
    """Some of its packages are compiled, so each Python has its own."""
    digest = hashlib.sha256(_S3FS_LOCK.read_bytes()).hexdigest()
    return cache_folder() / "bin" / f"s3fs-{digest[:16]}-{sys.implementation.cache_tag}"


def _there(path: Path) -> Path:
    if not path.exists():
        _without(f"{path.name if path.suffix == '' else 'azurite'} is not in the cache")
    return path


def _without(what: str) -> None:
    reason = f"needs an object store: {what} (make object-stores makes it)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


if __name__ == "__main__":
    try:
        make()
    except HarnessError as err:
        sys.exit(str(err))
