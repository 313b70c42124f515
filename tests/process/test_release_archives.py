"""
The whole of: what `tools/release_archives.py` makes is whole, says what it is, and has the same bytes whoever makes it.

Called from: pytest. The bills of materials need their program, which `make test-release` installs.
Must never: sign, or reach an index of packages.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from guard import repository
from support import helm
from support.deadlines import Deadline

TOOL: Final = repository.ROOT / "tools" / "release_archives.py"
VARIABLE: Final = "PILLION_CYCLONEDX"
"""Names the program of the bills."""
LOCKS: Final = {"pillion": None, "pillion_sidecar": "sidecar.lock", "pillion_operator": "operator.lock"}


def make(
    folder: Path, *options: str | Path, umask: int = 0o022, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, TOOL, folder, *options],
        env={**os.environ, **variables},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
        timeout=Deadline.SCRIPT.s,
    )


def programs() -> list[str | Path]:
    """Options for those that are on this machine."""
    found: list[str | Path] = []
    try:
        found += ["--helm", helm.find()]
    except pytest.skip.Exception:
        found += []
    if named := os.environ.get(VARIABLE):
        found += ["--sbom", named]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archives, where an earlier release left one."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "pillion-0.0.9.tgz").touch()
    done = make(folder, *programs())
    assert done.returncode == 0, done.stderr
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def version() -> str:
    return str(yaml.safe_load((repository.ROOT / "charts" / "pillion" / "Chart.yaml").read_text())["version"])


def test_archives_have_the_same_bytes_whoever_makes_them(made: Path, tmp_path: Path) -> None:
    """Another folder, umask, time zone and epoch of the caller's change no byte of any file."""
    done = make(tmp_path, *programs(), umask=0o077, TZ="Asia/Tokyo", SOURCE_DATE_EPOCH="1")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(made)


def test_the_sums_name_every_file_and_an_earlier_release_is_gone(made: Path) -> None:
    """`sha256sum --check --strict` accepts SHA256SUMS, which lists all that is there but itself: six archives of Python, and what else could be made."""
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
        cwd=made,
        capture_output=True,
        text=True,
        check=False,
        timeout=Deadline.PROCESS_START.s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [line.split("  ")[1] for line in (made / "SHA256SUMS").read_text().splitlines()]
    assert listed == sorted(contents(made).keys() - {"SHA256SUMS"})
    python = {f"{each}-{version()}{end}" for each in LOCKS for end in (".tar.gz", "-py3-none-any.whl")}
    assert python <= set(listed)
    assert "pillion-0.0.9.tgz" not in listed


def test_the_chart_is_the_folder_with_a_fixed_time(made: Path) -> None:
    """Every file of the chart is in the archive, byte for byte but for what helm writes anew, at one time of no clock; helm reads it."""
    helm.find()
    source = repository.ROOT / "charts" / "pillion"
    path = made / f"pillion-{version()}.tgz"
    with tarfile.open(path) as archive:
        entries = archive.getmembers()
        packed = {each.name.partition("/")[2]: archive.extractfile(each).read() for each in entries}  # type: ignore[union-attr]
    ours = {str(each.relative_to(source)): each.read_bytes() for each in source.rglob("*") if each.is_file()}
    # helm formats Chart.yaml anew.
    assert packed.keys() == ours.keys()
    assert {name for name in packed if packed[name] != ours[name]} <= {"Chart.yaml"}
    assert {each.mtime for each in entries} == {1580601600}
    assert yaml.safe_load(helm.run("show", "chart", str(path))) == yaml.safe_load((source / "Chart.yaml").read_text())


@pytest.mark.parametrize("package", LOCKS)
def test_a_bill_lists_each_pin_with_its_hashes(made: Path, package: str) -> None:
    """It is of the distribution and its version, and its components are the pins of the lock of its image, no more and no less, each with the lock's hashes."""
    if VARIABLE not in os.environ:
        pytest.skip("needs the program of the bills: make test-release")
    bill: dict[str, Any] = json.loads((made / f"{package}-{version()}.cdx.json").read_text())
    about = bill["metadata"]["component"]
    assert (about["name"], about["version"]) == (package.replace("_", "-"), version())
    assert "serialNumber" not in bill
    lock = LOCKS[package]
    text = (repository.ROOT / "requirements" / lock).read_text() if lock else ""
    pinned = {
        (name, number): set(re.findall(r"sha256:([0-9a-f]{64})", hashes))
        for name, number, hashes in re.findall(r"(?m)^([\w.-]+)==(\S+)((?:.*\\\n)*.*)$", text)
    }
    listed = {
        (each["name"], each["version"]): {
            digest["content"] for where in each["externalReferences"] for digest in where["hashes"]
        }
        for each in bill.get("components", [])
    }
    assert listed == pinned
    assert all(pinned.values())


def test_what_is_left_out_is_said_and_a_whole_release_refuses(tmp_path: Path) -> None:
    """Without helm and without the program of the bills, --whole ends with 1, and both are named."""
    done = make(tmp_path, "--whole", PATH="", PILLION_HELM="")
    assert done.returncode == 1
    assert "left out the chart" in done.stderr
    assert "left out the bills" in done.stderr


@pytest.mark.parametrize("tag", ["0.1.0", "v0.0.9", "v0.1.0rc1", ""])
def test_a_tag_that_is_not_the_version_is_refused(tmp_path: Path, tag: str) -> None:
    """Nothing is made for a tag other than `v` and the version."""
    done = make(tmp_path, "--tag", tag)
    assert done.returncode == 1
    assert f"is not v{version()}" in done.stderr
    assert list(tmp_path.iterdir()) == []
