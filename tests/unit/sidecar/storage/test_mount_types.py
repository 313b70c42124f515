"""Tests of which file system a path lies on."""

from pathlib import Path

import pytest

from pillion_sidecar.storage import mount_types
from pillion_sidecar.storage.local import LocalFolder

LINES = (
    "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
    "90 22 0:50 / /data rw - nfs4 server:/export rw",
    "91 90 0:51 / /data/bucket rw - fuse.s3fs s3fs rw",
    "92 22 0:52 / /two\\040words rw master:3 - xfs /dev/loop0 rw",
    "93 22 0:53 / /twice rw - tmpfs none rw",
    "94 93 0:54 / /twice rw - btrfs /dev/loop1 rw",
    "a line that the kernel has never written",
)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/home/x", "ext4"),
        ("/data", "nfs4"),
        ("/data/bucket/runs/1", "fuse.s3fs"),
        ("/data/bucket-2", "nfs4"),
        ("/two words/run", "xfs"),
        ("/twice/run", "btrfs"),
    ],
)
def test_the_nearest_and_last_mount_above_a_path_says_its_type(path: str, kind: str) -> None:
    """A name that begins like a mount's is not below it; of two mounts of one place the later one counts."""
    assert mount_types.find(path, LINES) == kind


def test_this_kernel_says_what_a_path_lies_on(tmp_path: Path) -> None:
    """The real table has /proc and the directory of a test."""
    assert mount_types.type_at("/proc/self") == "proc"
    assert mount_types.type_at(str(tmp_path))


def test_a_root_where_two_clients_can_create_one_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text names the type and what to do; nothing is written there."""
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 0:1 / {tmp_path} rw - fuse.s3fs s3fs rw\n")
    monkeypatch.setattr(mount_types, "_MOUNTS", table)
    root = tmp_path / "root"
    root.mkdir()
    problem = (
        f"the root {root} cannot be used: on fuse.s3fs two pods can create one file, and both believe that the root is theirs; "
        "give the URL of the bucket instead, s3://bucket/path"
    )
    assert LocalFolder(str(root)).check() == [problem]
    assert list(root.iterdir()) == []
