"""
The whole of: the workflows of the hosted CI are YAML, call commands that exist, and take no more rights than their jobs need.

Called from: pytest.
Must never: run one of them.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from guard import repository

WORKFLOWS: Final = sorted((repository.ROOT / ".github" / "workflows").glob("*.yaml"))
RELEASE: Final = repository.ROOT / ".github" / "workflows" / "release.yaml"
MAKEFILE: Final = (repository.ROOT / "Makefile").read_text()
TARGETS: Final = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))
PINNED: Final = re.compile(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def jobs(path: Path) -> dict[str, Any]:
    """The jobs of a workflow, by name."""
    read: dict[str, Any] = yaml.safe_load(path.read_text())
    found: dict[str, Any] = read["jobs"]
    return found


def called(job: Mapping[str, Any]) -> Iterator[str]:
    """The targets that a job's steps give to make; a variable of the shell is each value that the matrix has for it."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job["steps"]:
        for word in re.findall(r"(?:^|[\s;&])make +(\"?\$?[\w-]+)", step.get("run", ""), flags=re.MULTILINE):
            if not (name := word.strip('"')).startswith("$"):
                yield name
                continue
            (key,) = re.findall(r"matrix\.(\w+)", step["env"][name.removeprefix("$")])
            yield from matrix[key]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_each_target_that_a_workflow_makes_is_one_of_the_makefile(path: Path) -> None:
    """Each workflow has jobs with steps and a limit of time; every `make X` in them names a target, also where X is a value of a matrix."""
    found = jobs(path)
    named = {target for job in found.values() for target in called(job)}
    assert named != set()
    assert named - TARGETS == set()
    assert [name for name, job in found.items() if not (job["steps"] and job["timeout-minutes"])] == []


def test_the_makefile_lists_each_target_that_a_workflow_makes_as_no_file() -> None:
    """A file of the same name would otherwise let the step end well and do nothing."""
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    named = {target for path in WORKFLOWS for job in jobs(path).values() for target in called(job)}
    assert named - set(phony.split()) == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_no_right_that_a_job_did_not_ask_for(path: Path) -> None:
    """The rights of the whole workflow are to read the repository, or none; what writes is a right of one job, of the release alone."""
    assert yaml.safe_load(path.read_text())["permissions"] in ({}, {"contents": "read"})
    writing = {name for name, job in jobs(path).items() if "write" in job.get("permissions", {}).values()}
    assert writing == ({"images", "chart", "publish"} if path == RELEASE else set())


def test_each_action_of_the_release_is_named_by_its_commit() -> None:
    """A tag can be moved to other code; the comment has the version for people."""
    lines = [line.strip().removeprefix("- ") for line in RELEASE.read_text().splitlines() if "uses:" in line]
    assert lines != []
    assert [line for line in lines if not PINNED.fullmatch(line)] == []


def test_a_release_publishes_last_and_from_the_tag_that_was_checked() -> None:
    """The archives are made for the tag, and refused for another; everything else needs them, and the published release needs everything else."""
    found = jobs(RELEASE)
    assert yaml.safe_load(RELEASE.read_text())[True] == {"push": {"tags": ["v*"]}}
    commands = [step.get("run", "") for step in found["archives"]["steps"]]
    assert any("release-archives" in each and "--whole --tag $GITHUB_REF_NAME" in each for each in commands)
    assert set(found["publish"]["needs"]) == found.keys() - {"publish"}
    assert all("archives" in job["needs"] for name, job in found.items() if name != "archives")
