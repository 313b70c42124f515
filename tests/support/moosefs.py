"""
The whole of: a real shared file system, mounted twice on this machine as two pods mount a ReadWriteMany claim: MooseFS, with its master
and its chunk server in a network namespace of their own.

Called from: tests of the level distributed. Needs root, `ip`, and Debian's packages `moosefs-master moosefs-chunkserver moosefs-client`;
`missing()` says what is not there, `make test-filesystem` installs them.
Must never: listen anywhere but in the namespace that it made, or leave a mount, a process or a namespace behind.
"""

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from support import deadlines
from support.deadlines import Deadline

_ADDRESS: Final = "198.18.7.1"
"""Of RFC 2544; the chunk server takes no loopback address."""
_PROGRAMS: Final = ("ip", "nsenter", "mfsmaster", "mfschunkserver", "mfsmount")
_EMPTY: Final = Path("/var/lib/mfs/metadata.mfs.empty")
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str:
    """
    What is needed and not there; empty: nothing.
    """
    if os.geteuid() != 0:
        return "mounting a file system needs root"
    absent = [each for each in _PROGRAMS if shutil.which(each, path=_PATH) is None]
    if absent:
        return f"a shared file system needs {', '.join(absent)} (make test-filesystem installs them)"
    return "" if os.path.exists("/dev/fuse") else "a shared file system needs /dev/fuse"


@final
class MooseFs:
    """
    One file system, mounted at each of `mounts`. `close` takes it down.

    Args:
        folder: where its data and settings lie.
        mounts: empty directories, or ones to make.
        options: of `mfsmount -o`, for each of them.

    Blocks: up to Deadline.PROCESS_START for each of its programs.
    """

    def __init__(self, folder: Path, mounts: Sequence[Path], options: str = "") -> None:
        self._name = f"pillion-{uuid.uuid4().hex[:8]}"
        self._started: list[subprocess.Popen[bytes]] = []
        self._mounts: list[Path] = []
        self._logs = folder
        _run("ip", "netns", "add", self._name)
        try:
            self._ip("link", "set", "lo", "up")
            self._ip("address", "add", f"{_ADDRESS}/32", "dev", "lo")
            for name in ("master", "chunks", "disk"):
                (folder / name).mkdir()
            shutil.copy(_EMPTY, folder / "master" / "metadata.mfs")
            (folder / "exports").write_text(f"{_ADDRESS} / rw,alldirs,maproot=0:0\n")
            (folder / "disks").write_text(f"{folder / 'disk'}\n")
            listen = "".join(f"{each}_LISTEN_HOST = {_ADDRESS}\n" for each in ("MATOML", "MATOCS", "MATOCL"))
            (folder / "master.cfg").write_text(
                f"WORKING_USER = root\nDATA_PATH = {folder / 'master'}\nEXPORTS_FILENAME = {folder / 'exports'}\n{listen}"
            )
            (folder / "chunks.cfg").write_text(
                f"WORKING_USER = root\nDATA_PATH = {folder / 'chunks'}\nMASTER_HOST = {_ADDRESS}\nBIND_HOST = {_ADDRESS}\n"
                f"CSSERV_LISTEN_HOST = {_ADDRESS}\nHDD_CONF_FILENAME = {folder / 'disks'}\n"
            )
            self._start("mfsmaster", "-f", "-c", str(folder / "master.cfg"), "start")
            self.chunk_server = self._start("mfschunkserver", "-f", "-c", str(folder / "chunks.cfg"), "start")
            for mount in mounts:
                self.mount(mount, options)
        except BaseException:
            self.close()
            raise

    def mount(self, path: Path, options: str = "") -> None:
        """
        Mount it once more, as another pod's node would.

        Args:
            path: an empty directory, or one to make.
            options: of `mfsmount -o`.

        Blocks: up to Deadline.PROCESS_START.
        """
        chosen = ["-o", options] if options else []
        path.mkdir(exist_ok=True)

        def mounted() -> bool:
            if os.path.ismount(path):
                return True
            # The master may not listen yet: then the mount ends at once.
            if not tries or tries[-1].poll() is not None:
                tries.append(self._start("mfsmount", str(path), "-f", "-H", _ADDRESS, *chosen))
            return False

        tries: list[subprocess.Popen[bytes]] = []
        self._mounts.append(path)
        deadlines.eventually(mounted, Deadline.PROCESS_START, f"{path} is mounted")

        def takes_data() -> bool:
            try:
                (path / ".ready").write_bytes(b"ready")
            except OSError:
                return False
            return True

        deadlines.eventually(takes_data, Deadline.PROCESS_START, f"{path} takes data")
        (path / ".ready").unlink()

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self._logs / f"{command[0]}.log").open("ab") as log:
            process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._name}", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": _PATH},
            )
        self._started.append(process)
        return process

    def _ip(self, *arguments: str) -> None:
        _run("ip", "-n", self._name, *arguments)

    def close(self) -> None:
        """
        Unmount, end the programs and remove the namespace. Blocks: up to Deadline.PROCESS_EXIT for each.
        """
        for mount in self._mounts:
            subprocess.run(["umount", "--lazy", str(mount)], check=False, env={"PATH": _PATH}, capture_output=True)
        for process in reversed(self._started):
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(Deadline.PROCESS_EXIT.s)
        _run("ip", "netns", "delete", self._name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, env={"PATH": _PATH}, capture_output=True, timeout=Deadline.PROCESS_EXIT.s)
