"""
The whole of: what of a developer's machine must never get into the repository.

Called from: pytest.
Must never: contain what it looks for; the names are put together from parts.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Final

from guard import repository

LOCKS: Final = (
    "requirements/dev.lock",
    "requirements/frameworks.lock",
    "requirements/uv.lock",
    "requirements/build.lock",
    "requirements/sidecar.lock",
    "requirements/operator.lock",
    "requirements/s3fs.lock",
    "requirements/oldest.lock",
    "requirements/release.lock",
)

PIN: Final = re.compile(r"[a-z0-9][a-z0-9.-]*==[^\s/]+( ; [^/]*)? \\")
HASH: Final = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")

INDEX_HOSTS: Final = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("files", "pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("registry", "npmjs", "org"),
        ("proxy", "golang", "org"),
        ("repo1", "maven", "org"),
        ("static", "crates", "io"),
        ("deb", "debian", "org"),
    )
)

MACHINE_PATHS: Final = tuple(
    re.compile(rf"(?<![\w.>}})\]-]){re.escape(path)}(?![\w-])")
    for path in {str(repository.ROOT.resolve()), str(repository.ROOT.resolve().parent), str(Path.home()), sys.prefix}
    if path not in ("/", "/tmp")
)
HOMES: Final = re.compile(r"(?<![\w.>})\]-])/(?:home|Users)/[A-Za-z]\w*/")


def text_files() -> dict[str, bytes]:
    found = {}
    for path in repository.files():
        content = path.read_bytes()
        if b"\0" not in content:
            found[str(path.relative_to(repository.ROOT))] = content
    return found


def test_locks_name_no_address_and_no_path() -> None:
    """A lock holds names, versions and hashes, so that it works behind any index and says nothing about ours."""
    for name in LOCKS:
        for line in (repository.ROOT / name).read_text().splitlines():
            assert "://" not in line, (name, line)
            assert PIN.fullmatch(line) or HASH.fullmatch(line), (name, line)


def test_every_requirement_is_locked() -> None:
    """
    What the three distributions require, and what requirements/dev.in asks for, is in the lock that `make setup` installs. The client's extras but
    `sidecar` are frameworks, at the releases of their lock.
    """
    locked, frameworks = (
        dict(
            re.findall(
                r"^([a-z0-9][a-z0-9.-]*)==(\S+)",
                (repository.ROOT / "requirements" / name).read_text(),
                flags=re.MULTILINE,
            )
        )
        for name in ("dev.lock", "frameworks.lock")
    )
    for distribution in repository.DISTRIBUTIONS:
        project = tomllib.loads((repository.ROOT / distribution / "pyproject.toml").read_text())["project"]
        extras = [name for names in project.get("optional-dependencies", {}).values() for name in names]
        if distribution == "client":
            # What a laptop needs is locked as what the sidecar needs is.
            laptop = project["optional-dependencies"]["sidecar"]
            extras = [each for each in extras if each not in laptop]
            assert [each for each in extras if frameworks[each.split("==")[0]] != each.split("==")[1]] == []
            extras = laptop
        for requirement in [*project["dependencies"], *extras]:
            name = re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")
            if not name.startswith("pillion"):
                assert name in locked, f"{distribution}/pyproject.toml asks for {name}: add it to requirements/dev.in"
    comments = re.compile(r"^#.*$", flags=re.MULTILINE)
    asked = {
        line.split("==")[0] for line in comments.sub("", (repository.ROOT / "requirements/dev.in").read_text()).split()
    }
    assert asked <= locked.keys()


def test_no_file_names_a_package_index() -> None:
    """The index is the user's choice: no file of the repository names the host of one."""
    named = [(name, host) for name, content in text_files().items() for host in INDEX_HOSTS if host.encode() in content]
    assert named == []


def test_no_file_names_a_path_of_this_machine() -> None:
    """No file names this checkout, this venv, or anybody's home."""
    named = []
    for name, content in text_files().items():
        text = content.decode(errors="replace")
        for pattern in (*MACHINE_PATHS, HOMES):
            named += [(name, match.group()) for match in pattern.finditer(text)]
    assert named == []


def test_sources_are_ascii() -> None:
    """Every text file is ASCII, so that it reads the same in every terminal, diff and container."""
    bad = [name for name, content in text_files().items() if not content.isascii()]
    assert bad == []
