"""
Installs the client library for trainers whose image has none, or one with another version of the protocol.

    DIR/pillion/__init__.py          `shim`: becomes the client of the trainer's image, or the one below
    DIR/pillion/bundled/pillion/...  the client of the sidecar's image; sources only, as the trainer may have another Python

Called from: `__main__` (`pillion-sidecar client --to DIR`), in an init container of the training pod. It may run again in the same pod, even
after it was killed.
Must never: leave an incomplete package under its name, or change files in DIR that it has not created.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib import util
from pathlib import Path
from typing import Final

PACKAGE: Final = "pillion"
BUNDLED: Final = "bundled"
"""Name of the directory with the sidecar's client, as in `shim`. The shim cannot be imported here, because it would become another package."""
TEMPORARY: Final = ".pillion-"
"""Prefix of the directory in which the package is built."""
SUFFIXES: Final = (".py", ".typed")
FILE_MODE: Final = 0o644
FOLDER_MODE: Final = 0o755
"""Modes of files and directories, whatever the umask. The trainer may be another user, and only reads."""


def lay_out(folder: Path) -> Path:
    """
    Install the client in `folder`, in place of an earlier installation. Return the package's directory.

    Raises:
        OSError: the directory cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    making = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    made = making / "new"
    _copy_sources(_own_client(), made / BUNDLED / PACKAGE)
    shutil.copyfile(Path(__file__).with_name("shim.py"), made / "__init__.py")
    _open_to_readers(made)
    target = folder / PACKAGE
    if target.exists():
        target.rename(making / "old")
    made.rename(target)
    shutil.rmtree(making)
    return target


def _own_client() -> Path:
    spec = util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None, "the sidecar depends on the client"
    return Path(spec.origin).parent


def _copy_sources(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.suffix in SUFFIXES:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _open_to_readers(folder: Path) -> None:
    folder.chmod(FOLDER_MODE)
    for path in folder.rglob("*"):
        path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
