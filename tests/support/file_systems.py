"""
The whole of: file systems that tests write to: ext4, XFS and btrfs, each on a loop device, a tmpfs, and MooseFS, which is shared by way of FUSE.

Called from: tests of the levels storage_contract and distributed, and support.on_file_systems. Needs root, and of the kernel and of Debian's
packages what `absent()` names.
Must never: leave a mount or a loop device behind. A loop device goes with its last mount.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from support import moosefs
from support.deadlines import Deadline

SIZE_MIB: Final = 512
"""Size of a file system, MiB: XFS takes no less than 300. An image takes memory where something was written."""
_SPARE_MIB: Final = 16
"""Room beside an image, MiB."""
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"


class Kind(StrEnum):
    """Kinds of file system, by the names that the kernel and mkfs have for them; of MooseFS the kernel knows FUSE."""

    EXT4 = "ext4"
    XFS = "xfs"
    BTRFS = "btrfs"
    TMPFS = "tmpfs"
    MOOSEFS = "moosefs"

    @property
    def has_a_device(self) -> bool:
        """Whether it lies on a block device."""
        return self in (Kind.EXT4, Kind.XFS, Kind.BTRFS)


@dataclass(frozen=True, slots=True)
class Absence:
    """Why there is no file system of a kind here."""

    reason: str
    can_be_installed: bool
    """Whether `make test-filesystem` installs what is missing. False: this user, or the machine's kernel, cannot have it."""


def absent(kind: Kind) -> Absence | None:
    """
    Return what is missing for a file system of this kind; None: nothing. Blocks: for one short command.
    """
    if os.geteuid() != 0:
        return Absence("mounting a file system needs root", can_be_installed=False)
    if kind is Kind.MOOSEFS:
        reason = moosefs.missing()
        return Absence(reason, can_be_installed=os.path.exists("/dev/fuse")) if reason else None
    known = {line.split()[-1] for line in Path("/proc/filesystems").read_text(encoding="utf-8").splitlines()}
    if kind.value not in known:
        return Absence(f"the kernel of this machine has no {kind.value}", can_be_installed=False)
    if not kind.has_a_device:
        return None
    if not os.path.exists("/dev/loop-control") or _fails("losetup", "--find"):
        return Absence(f"{kind.value} needs a free loop device", can_be_installed=False)
    program = f"mkfs.{kind.value}"
    if shutil.which(program, path=_PATH) is None:
        return Absence(f"{kind.value} needs {program} (make test-filesystem installs it)", can_be_installed=True)
    return None


@contextlib.contextmanager
def mounted(kind: Kind, folder: Path) -> Iterator[Path]:
    """
    An empty file system, mounted for the time being.

    Args:
        folder: an empty directory, for its image, its mount and its servers.

    Blocks: up to Deadline.PROCESS_START for each command and server.

    Raises:
        subprocess.CalledProcessError: it cannot be made, mounted or unmounted.
    """
    place = folder / kind.value
    if kind is Kind.MOOSEFS:
        with contextlib.closing(moosefs.MooseFs(folder, [place])):
            yield place
        return
    if not kind.has_a_device:
        with mounted_image(kind, None, place, options=f"size={SIZE_MIB}m"):
            yield place
        return
    memory = folder / "memory"
    with _in_memory(memory):
        image = make_image(kind, memory / f"{kind.value}.img")
        with mounted_image(kind, image, place, options="loop"):
            yield place


@contextlib.contextmanager
def _in_memory(place: Path) -> Iterator[None]:
    """Room for an image. On a disk, a sync of a loop device waits for whatever else the machine writes: seconds, where tests have bounds of two."""
    place.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB + _SPARE_MIB}m", "tmpfs", str(place))
    try:
        yield
    finally:
        # The kernel may still be closing the image of the loop device.
        _fails("umount", "--lazy", str(place))


def make_image(kind: Kind, image: Path, size_mib: int = SIZE_MIB) -> Path:
    """
    Make a file that holds an empty file system. Blocks, raises: as `mounted`.
    """
    with image.open("wb") as file:
        file.truncate(size_mib * 2**20)
    _run(f"mkfs.{kind.value}", "-q", str(image))
    return image


@contextlib.contextmanager
def mounted_image(kind: Kind, image: Path | None, place: Path, *, options: str) -> Iterator[Path]:
    """
    A file system, mounted for the time being.

    Args:
        image: the file that holds it; None: it has none.
        place: a path where nothing is.
        options: of mount(8); `loop` makes a device of the image.

    Blocks, raises: as `mounted`.
    """
    place.mkdir()
    _run("mount", "-t", kind.value, "-o", options, str(image or kind.value), str(place))
    try:
        yield place
    finally:
        try:
            _run("umount", str(place))
        except subprocess.SubprocessError:
            # Somebody still has a file of it open: mount and device go with the last of them.
            _fails("umount", "--lazy", str(place))
            raise


def _run(*command: str) -> None:
    subprocess.run(command, check=True, env={"PATH": _PATH}, capture_output=True, timeout=Deadline.PROCESS_START.s)


def _fails(*command: str) -> bool:
    done = subprocess.run(command, env={"PATH": _PATH}, capture_output=True, timeout=Deadline.PROCESS_START.s)
    return done.returncode != 0
