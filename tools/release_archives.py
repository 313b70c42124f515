"""
Makes everything of a release that needs no host of code: `make release-archives`, or `release_archives.py FOLDER`.

Wheels and sdists, the chart's archive, a software bill of materials for each distribution, and SHA256SUMS over all of them. The bytes depend on the sources
and the locks alone. It must never leave a part out without saying so, or sign anything: the workflow does, as itself.
"""

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

import build_wheels
import sync_version

ROOT: Final = Path(__file__).parents[1]
SUMS: Final = "SHA256SUMS"
LOCKS: Final[dict[str, str | None]] = {
    "client": None,
    "sidecar": "requirements/sidecar.lock",
    "operator": "requirements/operator.lock",
}
"""By distribution: what its image has beside it, with hashes. The client requires nothing."""
PROGRAM_S: Final = 300.0
"""Seconds for helm or for the writer of bills to end; both take seconds on a quiet machine."""


def chart(folder: Path, helm: Path) -> Path:
    """
    Write the chart's archive as helm makes it, with the time of the wheels in the place of the clock's.

    Raises:
        subprocess.CalledProcessError: helm refused the chart; its words are on standard error.
    """
    with tempfile.TemporaryDirectory() as made:
        subprocess.run(
            [helm, "package", ROOT / "charts" / "pillion", "--destination", made],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=PROGRAM_S,
        )
        (packed,) = Path(made).iterdir()
        path = folder / packed.name
        path.write_bytes(_without_clock(packed.read_bytes()))
    return path


def _without_clock(archive: bytes) -> bytes:
    """The same files in the same order; helm 3 gives each the time of the packing."""
    plain = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as old,
        tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for entry in old:
            fresh = tarfile.TarInfo(entry.name)
            fresh.size, fresh.mode, fresh.mtime = entry.size, 0o644, int(build_wheels.EPOCH)
            new.addfile(fresh, old.extractfile(entry))
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=int(build_wheels.EPOCH)) as out:
        out.write(plain.getvalue())
    return packed.getvalue()


def bill(folder: Path, distribution: str, program: Path) -> Path:
    """
    Write the bill of one distribution in CycloneDX's JSON: itself, and every pin of its image's lock with its hashes. The program validates it by the schema.

    Raises:
        subprocess.CalledProcessError: the program refused; its words are on standard error.
    """
    about = ROOT / distribution / "pyproject.toml"
    package = "pillion" if distribution == "client" else f"pillion_{distribution}"
    path = folder / f"{package}-{sync_version.show()}.cdx.json"
    lock = LOCKS[distribution]
    subprocess.run(
        [program, "requirements", "-", "--pyproject", about, "--output-reproducible", "--output-file", path],
        input=(ROOT / lock).read_text() if lock else "",
        text=True,
        check=True,
        timeout=PROGRAM_S,
        # The program warns of a graph that has no edges: a lock has none.
        env={**os.environ, "SOURCE_DATE_EPOCH": build_wheels.EPOCH, "PYTHONWARNINGS": "ignore"},
    )
    return path


def sums(folder: Path, paths: list[Path]) -> Path:
    """Write the file that `sha256sum --check` reads, sorted by name."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(paths)]
    path = folder / SUMS
    path.write_text("".join(lines))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the archives of a release.")
    parser.add_argument("folder", type=Path, help="made if it is not there; what an earlier run left in it is replaced")
    parser.add_argument("--sbom", type=Path, help="cyclonedx-py; without it no bill is written")
    parser.add_argument(
        "--helm", type=Path, help="without it that of PILLION_HELM, or of the PATH; without any no chart is packed"
    )
    parser.add_argument("--tag", help="the tag of the release; refused unless it is v and the version")
    parser.add_argument("--whole", action="store_true", help="fail where a part has to be left out")
    args = parser.parse_args()
    if args.tag not in (None, f"v{sync_version.show()}"):
        print(f"release_archives.py: the tag {args.tag} is not v{sync_version.show()}, the version", file=sys.stderr)
        return 1
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("pillion*"), *folder.glob(SUMS)):
        old.unlink()
    os.environ["SOURCE_DATE_EPOCH"] = build_wheels.EPOCH
    made = [path for name in build_wheels.DISTRIBUTIONS for path in build_wheels.build(ROOT / name, folder)]
    left_out = []
    if helm := args.helm or os.environ.get("PILLION_HELM") or shutil.which("helm"):
        made.append(chart(folder, Path(helm)))
    else:
        left_out.append("the chart: no helm is on the PATH, and neither --helm nor PILLION_HELM names one")
    if args.sbom:
        made += [bill(folder, name, args.sbom) for name in build_wheels.DISTRIBUTIONS]
    else:
        left_out.append("the bills of materials: --sbom names no program")
    print(sums(folder, made).read_text(), end="")
    for each in left_out:
        print(f"release_archives.py: left out {each}", file=sys.stderr)
    return 1 if args.whole and left_out else 0


if __name__ == "__main__":
    sys.exit(main())
