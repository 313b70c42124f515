"""
The whole of: which files are the repository's.

Called from: the guard tests.
Must never: look at what git ignores.
"""

import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
DISTRIBUTIONS: Final = ("client", "sidecar", "operator")


def files() -> list[Path]:
    """
    What git tracks, and what it would track: new files count before they are added.
    """
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file()]


def python_files() -> list[Path]:
    """
    The sources among them.
    """
    return [path for path in files() if path.suffix == ".py"]
