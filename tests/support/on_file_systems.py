"""
The whole of: the option `--file-system`: each test that asks for `tmp_path` runs on a file system of each kind that is named.

Called from: tests/conftest.py, and tests that need a file system of a kind; `make test-filesystem` gives the option.
Must never: let a test know on which of them it runs, or skip what `make test-filesystem` could have installed on a machine of CI.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support import file_systems
from support.file_systems import Kind

_OPTION: Final = "--file-system"


def add_option(parser: pytest.Parser) -> None:
    """
    Adds the option.
    """
    kinds = [each.value for each in Kind]
    parser.addoption(
        _OPTION,
        action="append",
        default=[],
        choices=kinds,
        help="run what asks for tmp_path on a file system of this kind, and of each other one that is named (make test-filesystem)",
    )


def asked_for(config: pytest.Config) -> list[str]:
    """
    Return the kinds that the command line names.
    """
    kinds: list[str] = config.getoption(_OPTION)
    return kinds


def parametrize(metafunc: pytest.Metafunc) -> None:
    """
    One case for each kind.
    """
    kinds = asked_for(metafunc.config)
    if kinds and "file_system" in metafunc.fixturenames:
        metafunc.parametrize("file_system", kinds, indirect=True, scope="session")


def need(kind: Kind, config: pytest.Config) -> None:
    """
    Skip what needs a file system of this kind where there can be none. In CI, under the option, what is not installed is a failure.
    """
    absence = file_systems.absent(kind)
    if absence is None:
        return
    if absence.can_be_installed and os.environ.get("CI") and asked_for(config):
        pytest.fail(absence.reason, pytrace=False)
    pytest.skip(absence.reason)


@pytest.fixture(scope="session")
def file_system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """
    The mount on which the test runs; None: the option was not given.
    """
    name = getattr(request, "param", None)
    if name is None:
        yield None
        return
    kind = Kind(name)
    need(kind, request.config)
    with file_systems.mounted(kind, tmp_path_factory.mktemp(kind.value)) as place:
        yield place


@pytest.fixture
def tmp_path(file_system: Path | None, tmp_path: Path) -> Path:
    """
    An empty directory: pytest's own, or one on the file system that the option names.
    """
    if file_system is None:
        return tmp_path
    # Room for this test: what the one before has left goes.
    for left in file_system.glob("test_*"):
        shutil.rmtree(left)
    place = file_system / tmp_path.name
    place.mkdir()
    return place
