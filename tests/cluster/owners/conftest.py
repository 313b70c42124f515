"""
The whole of: the controllers of other projects, a fixture each, for tests whose pods they own.

Called from: pytest. Their images are built here and brought to the nodes, which the provider `built` can do; on another cluster the
tests say so and are skipped. A controller stays as long as the cluster: what it owns has finalizers that only it takes away.
Must never: leave a controller on a cluster that is kept.
"""

from collections.abc import Callable, Iterator

import pytest

from cluster import conftest as cluster_conftest
from cluster.harness import clusters
from cluster.harness.built import Built
from cluster.owners import controllers
from cluster.owners.controllers import Controller
from support.deadlines import Deadline
from support.kube import Kube
from support.release import Release

Make = Callable[[Callable[[], Controller]], Controller]


@pytest.fixture(scope="session")
def built(cluster: clusters.Cluster) -> Built:
    """The built cluster, to which images can be brought."""
    if not isinstance(cluster, Built):
        pytest.skip(
            f"the images of other projects' controllers are made for the provider built, and this is {cluster.name}"
        )
    return cluster


@pytest.fixture(scope="session")
def installed(built: Built, pytestconfig: pytest.Config) -> Iterator[Make]:
    """Installs a controller, for as long as the cluster is there."""
    made: list[Controller] = []

    def make(construct: Callable[[], Controller]) -> Controller:
        with cluster_conftest.aloud(pytestconfig):
            found = construct()
            made.append(found)
            found.install()
        return found

    yield make
    if pytestconfig.getoption("--keep-cluster"):
        everywhere = Kube(built.kubectl, built.kubeconfig, "default")
        everywhere.until(
            lambda: not cluster_conftest.leftovers(everywhere),
            Deadline.POD_GONE,
            "the namespaces of the tests to be gone",
        )
        for each in made:
            each.remove()


@pytest.fixture(scope="session")
def training_operator(built: Built, release: Release, installed: Make) -> Controller:
    """Kubeflow's training operator. After the product: a worker's init container has its image."""
    del release
    return installed(lambda: controllers.training_operator(built))


@pytest.fixture(scope="session")
def kueue(built: Built, release: Release, installed: Make) -> Controller:
    """Kueue."""
    return installed(lambda: controllers.kueue(built, release))


@pytest.fixture(scope="session")
def kuberay(built: Built, release: Release, installed: Make) -> Controller:
    """The KubeRay operator."""
    del release
    return installed(lambda: controllers.kuberay(built))


@pytest.fixture(scope="session")
def cert_manager(built: Built, release: Release, installed: Make) -> Controller:
    """cert-manager."""
    del release
    return installed(lambda: controllers.cert_manager(built))
