"""
Builds the three distributions, a wheel and an sdist each: `make wheels`, or `build_wheels.py FOLDER`.

The bytes depend on the sources alone: not on the clock, the umask, the folder or the machine. What builds them is in the lock, so nothing is downloaded.
It must never leave anything in the source folders, or a file of an earlier build in FOLDER.
"""

import argparse
import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Final

import hatchling.build

ROOT: Final = Path(__file__).parents[1]
DISTRIBUTIONS: Final = ("client", "sidecar", "operator")
EPOCH: Final = "1580601600"
"""Seconds: the time of every file in the archives, 2020-02-02, which is hatchling's own where nobody sets one."""


def build(source: Path, folder: Path) -> list[Path]:
    """
    Build the sdist and the wheel of the distribution in `source`. Return their paths.

    Changes the working directory while it runs, as the hooks of a build back end look there.
    """
    with contextlib.chdir(source), contextlib.redirect_stdout(io.StringIO()):
        return [folder / hatchling.build.build_sdist(str(folder)), folder / hatchling.build.build_wheel(str(folder))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Build wheels and sdists of client, sidecar and operator.")
    parser.add_argument("folder", type=Path, help="made if it is not there; archives of Pillion in it are replaced")
    parser.add_argument("--sources", type=Path, default=ROOT, help="folder with client/, sidecar/ and operator/")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("pillion*.whl"), *folder.glob("pillion*.tar.gz")):
        old.unlink()
    os.environ["SOURCE_DATE_EPOCH"] = EPOCH
    for name in DISTRIBUTIONS:
        for archive in build((args.sources / name).resolve(), folder):
            print(f"{hashlib.sha256(archive.read_bytes()).hexdigest()}  {archive.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
