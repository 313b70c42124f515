"""
The whole of: what pytest does for every test: its level, what is automatic for a level, and what is skipped here.

Called from: pytest.
Must never: hide a test without a reason that the summary shows.
"""

from pathlib import Path
from typing import Final

import pytest

from support.leaks import nothing_left
from support.processes import processes

__all__ = ["nothing_left", "processes"]

LEVELS: Final = ("unit", "golden", "property", "guard", "process", "distributed", "chart", "cluster")
"""Folders under tests/, quick ones first; each is a marker too."""

CLUSTERS: Final = ("auto", "built", "kind", "existing")
"""Providers of cluster.harness, which is not imported where no cluster is asked for."""

CLUSTER_TIMEOUT_S: Final = 600
"""The wall for one test on a cluster: it starts pods, some of them twice, and waits for kubelets. What fixtures make has bounds of its own: a
cluster from empty caches takes longer than any test, and none of its parts may."""

LEVELS_WITH_PROCESSES: Final = ("process", "distributed")

_TESTS: Final = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """
    Adds the options of our own.
    """
    parser.addoption("--update-golden", action="store_true", help="write the records of the golden tests anew")
    parser.addoption(
        "--cluster",
        choices=CLUSTERS,
        help="run the tests of the level cluster, on a cluster of this provider (make test-cluster)",
    )
    parser.addoption("--keep-cluster", action="store_true", help="leave the cluster up, and use one that is")


@pytest.fixture
def update_golden(pytestconfig: pytest.Config) -> bool:
    """
    Whether records are to be written anew.
    """
    return bool(pytestconfig.getoption("update_golden"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Marks each test with its level, orders quick levels first, and skips what this machine cannot run.
    """
    for item in items:
        level = _level(item)
        item.add_marker(level)
        if level == "cluster":
            item.add_marker(pytest.mark.timeout(CLUSTER_TIMEOUT_S, func_only=True))
            if not item.config.getoption("--cluster"):
                item.add_marker(pytest.mark.skip(reason="needs a cluster: make test-cluster, make test-owners"))
        # The list is shared by the parametrized items of one function.
        names = item.fixturenames if isinstance(item, pytest.Function) else []
        if level in LEVELS_WITH_PROCESSES and "nothing_left" not in names:
            # First in the list is set up first, so it is torn down after everything else of the test.
            names.insert(0, "nothing_left")
    items.sort(key=lambda item: LEVELS.index(_level(item)))

    wanting_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if wanting_gpu and (reason := _no_gpu()):
        for item in wanting_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


def _level(item: pytest.Item) -> str:
    level = item.path.relative_to(_TESTS).parts[0]
    if level not in LEVELS:
        raise pytest.UsageError(f"{item.path} is in no level; the levels are {', '.join(LEVELS)}")
    return level


def _no_gpu() -> str | None:
    # Imported here: most runs have no such test, and torch takes seconds.
    import torch

    return None if torch.cuda.is_available() else "needs CUDA, and torch sees none here"
