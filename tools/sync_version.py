"""
Writes the version of Pillion wherever it is said. The one place is `version` in client/pyproject.toml.

    .venv/bin/python tools/sync_version.py           # the other places, from that one
    .venv/bin/python tools/sync_version.py 0.2.0     # all of them, for a release
    .venv/bin/python tools/sync_version.py --show    # print it

The three distributions, the chart and the images are released together, and the chart takes its images by its appVersion. Beside this,
docs/releasing.md has what a release needs. It must never write a version that pip and helm do not both read as the same.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = "client/pyproject.toml"
FORM: Final = re.compile(r"\d+\.\d+\.\d+")
"""X.Y.Z alone: the form of a release candidate is 0.2.0rc1 for pip, and 0.2.0-rc1 for helm."""

PLACES: Final[dict[str, tuple[tuple[str, int], ...]]] = {
    "client/pyproject.toml": ((r'(?m)^version = "(?P<v>[^"]+)"$', 1), (r'"pillion-sidecar==(?P<v>[^"]+)"', 1)),
    "sidecar/pyproject.toml": ((r'(?m)^version = "(?P<v>[^"]+)"$', 1), (r'"pillion==(?P<v>[^"]+)"', 1)),
    "operator/pyproject.toml": ((r'(?m)^version = "(?P<v>[^"]+)"$', 1), (r'"pillion==(?P<v>[^"]+)"', 1)),
    "charts/pillion/Chart.yaml": ((r"(?m)^version: (?P<v>\S+)$", 1), (r"(?m)^appVersion: (?P<v>\S+)$", 1)),
    "examples/cluster/job.yaml": ((r"pillion-sidecar:(?P<v>\S+)", 1),),
    "tests/cluster/demo.py": ((r'"pillion-sidecar:(?P<v>[^"]+)"', 1),),
    "docs/guide/laptop.md": ((r"pillion-(?P<v>\d[^-]*)-py3", 1), (r"pillion_sidecar-(?P<v>[^-]+)-py3", 1)),
    "docs/guide/install.md": ((r"pillion-(?:operator|sidecar):(?P<v>\S+)", 4),),
}
"""By file: a pattern whose group `v` is the version, and how often it is there."""


class Refused(Exception):
    """The version, or a file, is not as it has to be; the text is for the person at the keyboard."""


def show() -> str:
    """The version of this checkout, X.Y.Z."""
    version: str = tomllib.loads((ROOT / SOURCE).read_text())["project"]["version"]
    return version


def written(name: str, version: str) -> str:
    """
    The text of the file with `version` in each of its places.

    Raises:
        Refused: a place is not there, or there more often than it was.
    """
    text = (ROOT / name).read_text()
    for pattern, count in PLACES[name]:
        found = list(re.finditer(pattern, text))
        if len(found) != count:
            raise Refused(f"{name}: {len(found)} places match {pattern!r}, expected {count}; mend PLACES in this file")
        for each in reversed(found):
            text = text[: each.start("v")] + version + text[each.end("v") :]
    return text


def check(version: str) -> str:
    """
    The version itself.

    Raises:
        Refused: it is not X.Y.Z.
    """
    if not FORM.fullmatch(version):
        raise Refused(f"{version!r} is not X.Y.Z, three numbers: pip and helm write everything else differently")
    return version


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the version of Pillion wherever it is said.")
    parser.add_argument("version", nargs="?", help="X.Y.Z; without it that of client/pyproject.toml")
    parser.add_argument("--show", action="store_true", help="print the version, and write nothing")
    args = parser.parse_args()
    if args.show:
        print(show())
        return 0
    try:
        version = check(args.version or show())
        # All are read before one is written.
        texts = {name: written(name, version) for name in PLACES}
    except Refused as err:
        print(f"sync_version.py: {err}", file=sys.stderr)
        return 1
    for name, text in texts.items():
        if (ROOT / name).read_text() != text:
            (ROOT / name).write_text(text)
            print(f"{name}: {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
