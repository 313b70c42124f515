"""
The whole of: what pytest does for every test: its level, what is automatic for a level, and what is skipped here.

Called from: pytest.
Must never: hide a test without a reason that the summary shows.
"""

from pathlib import Path
from typing import Final

import hypothesis
import pytest

from support import on_file_systems
from support.leaks import nothing_left
from support.object_stores.fixtures import (
    SERVERS,
    azure_bucket,
    azure_server,
    bucket,
    gcs_bucket,
    gcs_proxy,
    gcs_server,
    object_server,
    proxy,
    s3_bucket,
    s3_proxy,
    s3_server,
    stock_reader,
)
from support.on_file_systems import file_system, tmp_path
from support.processes import processes

__all__ = [
    "azure_bucket",
    "azure_server",
    "bucket",
    "file_system",
    "gcs_bucket",
    "gcs_proxy",
    "gcs_server",
    "nothing_left",
    "object_server",
    "processes",
    "proxy",
    "s3_bucket",
    "s3_proxy",
    "s3_server",
    "stock_reader",
    "tmp_path",
]

# How long an example takes says how busy the machine is: Hypothesis fails one above 200 ms by default. The wall of each test bounds it.
hypothesis.settings.register_profile("pillion", deadline=None)
hypothesis.settings.load_profile("pillion")

LEVELS: Final = (
    "unit",
    "golden",
    "property",
    "guard",
    "process",
    "storage_contract",
    "distributed",
    "frameworks",
    "chart",
    "cluster",
)
"""Folders under tests/, quick ones first; each is a marker too."""

CLUSTERS: Final = ("auto", "built", "kind", "existing")
"""Providers of cluster.harness, which is not imported where no cluster is asked for."""

CLUSTER_TIMEOUT_S: Final = 600
"""The wall for one test on a cluster: it starts pods, some of them twice, and waits for kubelets. What fixtures make has bounds of its own: a
cluster from empty caches takes longer than any test, and none of its parts may."""

LEVELS_WITH_PROCESSES: Final = ("process", "distributed", "frameworks")

LASTING: Final = (*SERVERS, "file_system")
"""Fixtures that live longer than a test."""

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
    parser.addoption(
        "--frameworks",
        action="store_true",
        help="run the tests of the level frameworks, in their own environment (make test-frameworks)",
    )
    on_file_systems.add_option(parser)
    parser.addoption("--keep-cluster", action="store_true", help="leave the cluster up, and use one that is")


@pytest.fixture
def update_golden(pytestconfig: pytest.Config) -> bool:
    """
    Whether records are to be written anew.
    """
    return bool(pytestconfig.getoption("update_golden"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """
    Makes a case for each file system that the command line names.
    """
    on_file_systems.parametrize(metafunc)


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
            # First in the list is set up first, so it is torn down after everything else of the test. What lives as long as the run is
            # no leak of one test: it has to be there before.
            lasting = [name for name in names if name in LASTING]
            names[:] = [*lasting, "nothing_left", *(name for name in names if name not in LASTING)]
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
