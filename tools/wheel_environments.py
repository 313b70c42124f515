"""
Makes the environments in which the wheels are tried: `make test-wheels`, or `wheel_environments.py FOLDER [3.12 ...]`.

Each is a new virtual environment, `FOLDER/3.11-oldest` say, with a CPython of this machine, pip, a torch of the locks, NumPy, and nothing of Pillion.
It must never download an interpreter, or end well where this machine has none.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
TORCHES: Final[dict[str, tuple[str, ...]]] = {
    "oldest": ("--require-hashes", "-r", str(ROOT / "requirements" / "oldest.lock")),
    "newest": ("--constraint", str(ROOT / "requirements" / "dev.lock"), "torch", "numpy"),
}
"""What uv installs, by the name of the torch."""
ENVIRONMENTS: Final = (("3.11", "oldest"), ("3.11", "newest"), ("3.12", "newest"), ("3.13", "newest"))
"""Python and torch. torch 2.6 needs a NumPy and a Python of its time, so the oldest Python stands for it."""
ANSWER_S: Final = 60.0
"""Seconds for an interpreter to say its version."""


def candidates(version: str) -> Iterator[Path]:
    """Where a CPython of the version may be: on the PATH, among those of pyenv, among those of uv."""
    if on_path := shutil.which(f"python{version}"):
        yield Path(on_path)
    homes = (
        Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions",
        Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local" / "share" / "uv" / "python")),
    )
    for home in homes:
        yield from sorted(home.glob(f"*{version}.*/bin/python{version}"), reverse=True)


def interpreter(version: str) -> Path | None:
    """The first candidate that runs, is a CPython, and has the version. pyenv leaves programs on the PATH that only say how to choose one."""
    code = "import sys; print(sys.implementation.name, '%d.%d' % sys.version_info[:2])"
    for path in candidates(version):
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False, timeout=ANSWER_S)
        if done.stdout.split() == ["cpython", version]:
            return path
    return None


def make(folder: Path, python: Path, torch: str) -> None:
    """Make the environment anew. uv links the files of its cache where that is on the same file system."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    uv = Path(sys.executable).with_name("uv")
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *TORCHES[torch]], check=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the environments in which the wheels are tried.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("versions", nargs="*", help="of Python; all without one")
    args = parser.parse_args()
    wanted = [each for each in ENVIRONMENTS if not args.versions or each[0] in args.versions]
    pythons = {version: interpreter(version) for version, _ in wanted}
    for version, python in pythons.items():
        print(f"CPython {version}: {python or 'none on this machine, so it is left out'}")
    if not any(pythons.values()):
        print("wheel_environments.py: none of the Pythons that were asked for is on this machine", file=sys.stderr)
        return 1
    for version, torch in ENVIRONMENTS:
        folder = args.folder / f"{version}-{torch}"
        if python := pythons.get(version):
            print(f"making {folder}", flush=True)
            make(folder, python, torch)
        else:
            # What an earlier run made would be tried as if it were of this one.
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
