"""
The whole of: what the three distributions and the chart say of themselves agrees, and is what an index of packages shows.

Called from: pytest.
Must never: build anything; tests/process/test_wheels.py does.
"""

import importlib.util
import itertools
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
import yaml

from guard import repository

OLDEST_PYTHON: Final = ">=3.11"


def project(distribution: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((repository.ROOT / distribution / "pyproject.toml").read_text())["project"]
    return found


@pytest.fixture
def sync_version() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sync_version", repository.ROOT / "tools" / "sync_version.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_same_wherever_it_is_said(sync_version: ModuleType) -> None:
    """Writing the client's version to every place that `tools/sync_version.py` knows changes no file."""
    version = sync_version.show()
    stale = [
        name
        for name in sync_version.PLACES
        if sync_version.written(name, version) != (repository.ROOT / name).read_text()
    ]
    assert stale == [], "run .venv/bin/python tools/sync_version.py"
    assert sync_version.check(version) == version


def test_distributions_and_chart_have_one_version_and_pin_one_another(sync_version: ModuleType) -> None:
    """The three distributions and both versions of the chart are equal, and what one of ours requires of another is that very version."""
    version = sync_version.show()
    chart = yaml.safe_load((repository.ROOT / "charts" / "pillion" / "Chart.yaml").read_text())
    assert {project(each)["version"] for each in repository.DISTRIBUTIONS} == {
        chart["version"],
        chart["appVersion"],
        version,
    }
    for distribution in repository.DISTRIBUTIONS:
        about = project(distribution)
        asked = [*about["dependencies"], *itertools.chain(*about.get("optional-dependencies", {}).values())]
        ours = [each for each in asked if each.startswith("pillion")]
        assert {each.partition("==")[2] for each in ours} <= {version}


@pytest.mark.parametrize("version", ["0.2", "0.2.0rc1", "0.2.0-rc1", "v0.2.0", ""])
def test_a_version_that_pip_and_helm_write_differently_is_refused(sync_version: ModuleType, version: str) -> None:
    """Three numbers are a version; a candidate, a `v` before it and a missing number are not."""
    with pytest.raises(sync_version.Refused, match="three numbers"):
        sync_version.check(version)


@pytest.mark.parametrize("distribution", repository.DISTRIBUTIONS)
def test_each_distribution_says_what_an_index_shows(distribution: str) -> None:
    """Description, README, license with its file, Python, classifiers of the same Pythons, and the mark of a typed package are there."""
    about = project(distribution)
    folder: Path = repository.ROOT / distribution
    assert (about["readme"], about["license"], about["license-files"]) == ("README.md", "Apache-2.0", ["LICENSE"])
    assert (folder / "LICENSE").read_bytes() == (repository.ROOT / "LICENSE").read_bytes()
    assert about["requires-python"] == OLDEST_PYTHON
    assert about["description"].startswith("Checkpointing that leaves the PyTorch training process")
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3.11"} <= set(
        about["classifiers"]
    )
    assert len(list((folder / "src").glob("*/py.typed"))) == 1


@pytest.mark.parametrize("distribution", repository.DISTRIBUTIONS)
def test_the_readme_of_a_distribution_has_no_link_into_the_repository(distribution: str) -> None:
    """An index shows the README without the repository around it, so that a relative link or picture would lead nowhere."""
    text = (repository.ROOT / distribution / "README.md").read_text()
    assert text.startswith(f"# {project(distribution)['name']}\n")
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text) == []
