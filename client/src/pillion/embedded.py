"""
The sidecar of a run without a cluster. The client finds it by its runtime directory, or starts it as a child.

Called from: `Checkpointer`. The child runs in a process session of its own, without inherited pipes. torchrun ends its workers by
process group, and the sidecar must outlive them, as it holds the newest snapshot. An inherited pipe would stay open, and hang the
program that captures torchrun's output.

    <tmpfs>/pillion-<uid>-<digest of root and pod>/     owned by this user alone, mode 0700, checked before each use
        sidecar.log     log of the sidecar and its executor. It is not on the root, because writing a line to a storage that hangs
                        would hang the writer. A sidecar that ends cleanly appends it to <root>/.pillion/sidecar-<rank>.log
        control.sock, sidecar.lock, segment-*.arena
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import BinaryIO, Final

from pillion import group
from pillion.errors import SidecarUnavailable
from pillion.wire import names

START_TIMEOUT_S: Final = 60.0
"""Timeout for a started sidecar to listen. It takes 0.3 s on an idle machine, and much longer on a loaded one with a cold disk."""
ALREADY_RUNNING: Final = 75
"""Exit status (EX_TEMPFAIL) of a sidecar when another sidecar owns the runtime directory."""
RESPAWN_PAUSE_S: Final = 0.2
"""Pause before another attempt to get the lock. An ending sidecar holds it for some 100 ms more."""
FOLDER_TRIES: Final = 3
"""Maximum attempts to create the runtime directory. An ending sidecar removes it at most once."""
POLL_S: Final = 0.02
"""Pause between two checks of the socket while the sidecar starts. The first save comes much later."""


def runtime_directory(key: str, environ: Mapping[str, str]) -> str:
    """
    Return the directory of the arena and the socket of this run and pod. It is the same after a restart of the trainers.

    In a pod the injector sets it (PILLION_RUNTIME_DIR). Otherwise it is derived from `key`, on a tmpfs.
    """
    injected = environ.get(names.ENV_RUNTIME_DIR)
    if injected:
        return injected
    # All ranks of a pod must get one directory. torchrun's node rank is no key, as it may change at a restart.
    pod = group.pod_identity(environ)
    digest = hashlib.sha256(os.fsencode(f"{key}\0{pod}")).hexdigest()[:16]  # a path may hold any bytes
    base = "/dev/shm" if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    return os.path.join(base, f"{names.RUNTIME_PREFIX}{os.getuid()}-{digest}")


def log_path(runtime_dir: str) -> str:
    """Return the path of the sidecar's log in a runtime directory."""
    return os.path.join(runtime_dir, names.SIDECAR_LOG)


def require_private(runtime_dir: str) -> None:
    """
    Check that the runtime directory belongs to this user alone.

    Its name can be guessed, and its content is trusted. Another user who created it first could make the trainer map memory, and
    unpickle bytes, of their choice.

    Raises:
        SidecarUnavailable: it exists, and is another user's, open to others, or not a directory.
    """
    try:
        status = os.lstat(runtime_dir)
    except FileNotFoundError:
        return
    problem = ""
    if not stat.S_ISDIR(status.st_mode):
        problem = "is not a directory"
    elif status.st_uid != os.getuid():
        problem = f"belongs to user {status.st_uid}"
    elif status.st_mode & 0o077:
        problem = f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o})"
    if problem:
        raise SidecarUnavailable(
            f"the runtime directory {runtime_dir} {problem}: it must belong to user {os.getuid()} alone (mode 0700); remove it"
        )


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """
    Return the environment of a sidecar: this process's, without relative paths.

    Entries of PYTHONPATH are made absolute. The rest of this process's import path is included for the executor, which imports a
    `StorageWriter` by name.
    """
    # In PYTHONPATH an empty entry is the working directory, as it is in sys.path.
    paths = [os.path.abspath(each) for each in environ.get("PYTHONPATH", "").split(os.pathsep)]
    more = [os.path.abspath(each) for each in sys.path]
    made = {**environ, names.ENV_IMPORT_PATH: os.pathsep.join(more)}
    if environ.get("PYTHONPATH"):
        made["PYTHONPATH"] = os.pathsep.join(paths)
    return made


def start(runtime_dir: str) -> int:
    """
    Start a sidecar for `runtime_dir`, and wait until it listens. Returns its process id.

    If another sidecar already owns the directory, the new one exits at once. Then the other one's socket is used; if that sidecar was
    ending, another one is started.

    Blocks: up to START_TIMEOUT_S.

    Raises:
        SidecarUnavailable: the sidecar is not installed, or ended. The text has the end of its log. Also see `require_private`.
    """
    log = log_path(runtime_dir)
    command = [sys.executable, "-m", "pillion_sidecar", "run", "--runtime-dir", runtime_dir, "--embedded"]
    child = _spawn(command, runtime_dir)
    path = os.path.join(runtime_dir, names.CONTROL_SOCKET)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if _listens(path):
            # Waits for the child, so that it leaves no zombie in a trainer that lives longer.
            threading.Thread(target=child.wait, name="pillion-reap", daemon=True).start()
            return child.pid
        status = child.poll()
        if status == ALREADY_RUNNING:
            # The sidecar with the lock is about to listen or about to end. In the second case a new child gets the lock.
            time.sleep(RESPAWN_PAUSE_S)
            if not _listens(path):
                child = _spawn(command, runtime_dir)
        elif status is not None:
            raise SidecarUnavailable(f"the sidecar exited with status {status} before it was ready: {_tail(log)}")
        time.sleep(POLL_S)
    child.kill()
    child.wait()
    raise SidecarUnavailable(f"the sidecar was not ready within {START_TIMEOUT_S:.0f} s: {_tail(log)}")


def _spawn(command: list[str], runtime_dir: str) -> subprocess.Popen[bytes]:
    with _log_file(runtime_dir) as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
            cwd="/",
            env=environment(os.environ),
        )


def _log_file(runtime_dir: str) -> BinaryIO:
    for _ in range(FOLDER_TRIES):
        with contextlib.suppress(FileExistsError):
            os.mkdir(runtime_dir, mode=0o700)
        require_private(runtime_dir)
        with contextlib.suppress(FileNotFoundError):
            return open(log_path(runtime_dir), "ab")
    raise SidecarUnavailable(
        f"cannot create {runtime_dir}: ending sidecars removed it {FOLDER_TRIES} times; start again"
    )


def _listens(path: str) -> bool:
    # The file alone proves nothing: a killed sidecar leaves its socket behind.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _tail(path: str, length: int = 2000) -> str:
    try:
        with open(path, "rb") as file:
            text = file.read()[-length:].decode(errors="replace").strip()
            return f"{text} ({path})" if text else f"its log {path} is empty"
    except OSError as err:
        return f"no log: {err}"
