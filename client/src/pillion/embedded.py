"""
The sidecar of a run without a cluster: found by its runtime directory, started as a child when it is not there.

Called from: `Checkpointer`. The child runs in a session of its own with no inherited pipes: torchrun ends its workers by
process group, and the sidecar has to outlive them (it holds the newest snapshot); a pipe it kept open would hang whoever
captures torchrun's output.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Final

from pillion import group
from pillion.errors import SidecarUnavailable
from pillion.wire import names

START_TIMEOUT_S: Final = 60.0
"""Bound for a started sidecar to listen. It takes 0.3 s on an idle machine; a loaded one with a cold disk takes long."""
ALREADY_RUNNING: Final = 75
"""The sidecar's exit status (EX_TEMPFAIL) when another one owns the runtime directory."""
RESPAWN_PAUSE_S: Final = 0.2
"""Pause before another try for the lock: a sidecar that ends holds it for some 100 ms more."""
POLL_S: Final = 0.02
"""Pause between two looks for the socket while it starts: the first save is far behind it."""


def runtime_directory(key: str, environ: Mapping[str, str]) -> str:
    """
    Where the arena and the socket of this run and pod live: the same again after a restart of the trainers.

    In a pod the injector says it (PILLION_RUNTIME_DIR); else it is derived from `key` on a tmpfs.
    """
    injected = environ.get(names.ENV_RUNTIME_DIR)
    if injected:
        return injected
    # Whoever counts as one pod has to find one directory; torchrun's number of the node may change at a restart.
    pod = group.pod_identity(environ)
    digest = hashlib.sha256(f"{key}\0{pod}".encode()).hexdigest()[:16]
    base = "/dev/shm" if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    return os.path.join(base, f"{names.RUNTIME_PREFIX}{os.getuid()}-{digest}")


def start(runtime_dir: str, log_path: str) -> int:
    """
    Start a sidecar for `runtime_dir` and wait until it listens; its process id.

    A sidecar that already owns the directory makes the new one exit at once; its socket is then the one found, or, when
    it was ending, another one is started.

    Blocks: up to START_TIMEOUT_S.

    Raises:
        SidecarUnavailable: it is not installed, or ended; the text holds the end of its log.
    """
    os.makedirs(runtime_dir, mode=0o700, exist_ok=True)
    command = [sys.executable, "-m", "pillion_sidecar", "run", "--runtime-dir", runtime_dir, "--embedded"]
    child = _spawn(command, log_path)
    path = os.path.join(runtime_dir, names.CONTROL_SOCKET)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if _listens(path):
            # Reaped when it ends, so that it leaves no zombie in a trainer that lives longer.
            threading.Thread(target=child.wait, name="pillion-reap", daemon=True).start()
            return child.pid
        status = child.poll()
        if status == ALREADY_RUNNING:
            # The one that has the lock is about to listen, or about to end: then this one's successor gets it.
            time.sleep(RESPAWN_PAUSE_S)
            if not _listens(path):
                child = _spawn(command, log_path)
        elif status is not None:
            raise SidecarUnavailable(f"the sidecar ended with status {status} before it listened: {_tail(log_path)}")
        time.sleep(POLL_S)
    child.kill()
    child.wait()
    raise SidecarUnavailable(f"the sidecar did not listen within {START_TIMEOUT_S:.0f} s: {_tail(log_path)}")


def _spawn(command: list[str], log_path: str) -> subprocess.Popen[bytes]:
    with open(log_path, "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, close_fds=True, cwd="/"
        )


def _listens(path: str) -> bool:
    # The file alone says nothing: a killed sidecar leaves its socket behind.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _tail(path: str, length: int = 2000) -> str:
    try:
        with open(path, "rb") as file:
            return file.read()[-length:].decode(errors="replace").strip() or "its log is empty"
    except OSError as err:
        return f"no log: {err}"
