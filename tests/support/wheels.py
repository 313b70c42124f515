"""
The whole of: the wheels of this checkout, built once for the tests of a module.

Called from: tests/process/test_wheels.py.
Must never: reach an index of packages.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from support.deadlines import Deadline

ROOT: Final = Path(__file__).parents[2]
BUILDER: Final = ROOT / "tools" / "build_wheels.py"
PACKAGES: Final = {"client": "pillion", "sidecar": "pillion_sidecar", "operator": "pillion_operator"}


def build(folder: Path, *, sources: Path = ROOT, umask: int = 0o022) -> Path:
    """Build all six archives. Return `folder`."""
    run([sys.executable, BUILDER, folder, "--sources", sources], umask=umask)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels and sdists of this checkout."""
    return build(tmp_path_factory.mktemp("dist"))


def wheel(built: Path, distribution: str) -> Path:
    """The wheel of client, sidecar or operator."""
    return next(built.glob(f"{PACKAGES[distribution]}-*.whl"))


def run(command: Sequence[str | Path], *, umask: int = -1) -> None:
    """Run it to its end, with exit status 0. Blocks: up to Deadline.PROCESS_START."""
    done = subprocess.run(
        command, umask=umask, capture_output=True, text=True, timeout=Deadline.PROCESS_START.s, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
