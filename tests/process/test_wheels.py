"""
The whole of: what is in the wheels and sdists of this checkout. tests/distributed/test_wheels.py runs them.

Called from: pytest.
Must never: reach an index of packages.
"""

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from guard import repository
from support.deadlines import Deadline
from support.wheels import PACKAGES, build, built, wheel

__all__ = ["built"]

PROGRAMS: Final[dict[str, set[str]]] = {
    "client": set(),
    "sidecar": {"pillion", "pillion-sidecar", "kubectl-pillion"},
    "operator": {"pillion-operator"},
}


def digests(folder: Path) -> Mapping[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_build_from_the_sdists_has_the_same_bytes(built: Path, tmp_path: Path) -> None:
    """Three wheels and three sdists: unpacked sdists, in another folder and with another umask, become the very same six files."""
    sources = tmp_path / "sources"
    for distribution, package in PACKAGES.items():
        with tarfile.open(next(built.glob(f"{package}-*.tar.gz"))) as sdist:
            sdist.extractall(tmp_path, filter="data")
        shutil.copytree(next(tmp_path.glob(f"{package}-*")), sources / distribution)
    assert len(digests(built)) == 6
    assert digests(build(tmp_path / "again", sources=sources, umask=0o077)) == digests(built)


@pytest.mark.parametrize("distribution", repository.DISTRIBUTIONS)
def test_a_wheel_holds_its_package_and_nothing_else(built: Path, distribution: str) -> None:
    """Every module of src/ that git would track is in the wheel, with py.typed and the license; no test, no other folder, no compiled file."""
    package = PACKAGES[distribution]
    source = repository.ROOT / distribution / "src"
    expected = {str(path.relative_to(source)) for path in repository.files() if path.is_relative_to(source)}
    names = set(zipfile.ZipFile(wheel(built, distribution)).namelist())
    about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - about == expected
    assert f"{package}/py.typed" in names
    assert [name for name in about if name.endswith("/licenses/LICENSE")] != []


@pytest.mark.parametrize("distribution", repository.DISTRIBUTIONS)
def test_a_wheel_says_what_pip_and_an_index_need(built: Path, distribution: str) -> None:
    """The metadata has the README as its long description, the Pythons, the license; the programs are those that the documents name."""
    archive = zipfile.ZipFile(wheel(built, distribution))
    folder = next(name for name in archive.namelist() if name.endswith("/METADATA")).removesuffix("METADATA")
    about = email.message_from_bytes(archive.read(folder + "METADATA"))
    assert about["Requires-Python"] == ">=3.11"
    assert (about["License-Expression"], about["Description-Content-Type"]) == ("Apache-2.0", "text/markdown")
    assert about.get_payload() == (repository.ROOT / distribution / "README.md").read_text()
    scripts = archive.read(folder + "entry_points.txt").decode() if PROGRAMS[distribution] else ""
    assert set(re.findall(r"^([\w-]+) = ", scripts, flags=re.MULTILINE)) == PROGRAMS[distribution]


def test_the_extra_for_a_laptop_brings_the_sidecar_and_never_a_torch(built: Path) -> None:
    """`pillion[sidecar]` requires the sidecar of the same version, and NumPy; torch is in no requirement that pip would follow from it."""
    archives = {each: zipfile.ZipFile(wheel(built, each)) for each in ("client", "sidecar")}
    required = {}
    for each, archive in archives.items():
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        required[each] = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    version = wheel(built, "client").name.split("-")[1]
    assert [each for each in required["client"] if "extra" not in each] == []
    assert {each for each in required["client"] if "'sidecar'" in each} == {
        "numpy; extra == 'sidecar'",
        f"pillion-sidecar=={version}; extra == 'sidecar'",
    }
    assert f"pillion=={version}" in required["sidecar"]
    assert [each for each in required["sidecar"] if each.startswith("torch") and "extra" not in each] == []


def test_without_any_python_there_is_nothing_to_try_and_that_is_an_error(tmp_path: Path) -> None:
    """
    Each Python that is missing is named, one on the PATH that only fails is as good as missing, and the end is exit status 1: no run without an
    environment ends well.
    """
    (tmp_path / "python3.12").write_text("#!/bin/sh\necho choose a version >&2\nexit 127\n")
    (tmp_path / "python3.12").chmod(0o755)
    nowhere = {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path), "UV_PYTHON_INSTALL_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, repository.ROOT / "tools" / "wheel_environments.py", tmp_path / "made"],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        check=False,
        timeout=Deadline.PROCESS_START.s,
    )
    assert done.returncode == 1
    assert re.findall(r"CPython (\S+): none", done.stdout) == ["3.11", "3.12", "3.13"]
    assert "none of the Pythons" in done.stderr
    assert not (tmp_path / "made").exists()
