"""
The whole of: the fixtures of the object stores: a new bucket for each test, on a server that lives as long as the run.

Called from: tests/conftest.py.
Must never: start a server that no test asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.object_stores import programs, stock_load
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.places import Kind, Place
from support.object_stores.servers import Server, serve
from support.object_stores.stock_load import StockReader

SERVERS: Final = ("object_server", "s3_server", "azure_server", "gcs_server")
"""Fixtures that live as long as the run."""


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """
    versitygw.
    """
    yield from _serve("s3", tmp_path_factory.mktemp("s3"))


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """
    Azurite.
    """
    yield from _serve("azure", tmp_path_factory.mktemp("azure"))


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """
    The fake.
    """
    yield from _serve("gcs", tmp_path_factory.mktemp("gcs"))


@pytest.fixture(scope="session", params=["s3", "gcs", "azure"])
def object_server(request: pytest.FixtureRequest) -> Server:
    """
    A server of each kind in turn.
    """
    each: Server = request.getfixturevalue(f"{request.param}_server")
    return each


@pytest.fixture
def s3_bucket(s3_server: Server) -> Place:
    """
    An empty bucket of S3.
    """
    return s3_server.make_bucket()


@pytest.fixture
def azure_bucket(azure_server: Server) -> Place:
    """
    An empty container of Azure.
    """
    return azure_server.make_bucket()


@pytest.fixture
def gcs_bucket(gcs_server: Server) -> Place:
    """
    An empty bucket of the fake GCS.
    """
    return gcs_server.make_bucket()


@pytest.fixture
def bucket(object_server: Server) -> Place:
    """
    An empty bucket of each kind of store in turn.
    """
    return object_server.make_bucket()


@pytest.fixture
def s3_proxy(s3_bucket: Place) -> Iterator[FaultProxy]:
    """
    A proxy for faults, in front of an empty bucket of S3.
    """
    with FaultProxy(s3_bucket) as proxy:
        yield proxy


@pytest.fixture
def gcs_proxy(gcs_bucket: Place) -> Iterator[FaultProxy]:
    """
    The same in front of the fake GCS, for what is the same everywhere.
    """
    with FaultProxy(gcs_bucket) as proxy:
        yield proxy


@pytest.fixture
def proxy(bucket: Place) -> Iterator[FaultProxy]:
    """
    The same in front of each kind of store in turn.
    """
    with FaultProxy(bucket) as each:
        yield each


@pytest.fixture(params=stock_load.READERS)
def stock_reader(request: pytest.FixtureRequest) -> StockReader:
    """
    Each reader of stock torch in turn. Where the packages of one are not there, its test is skipped before it has begun.
    """
    return StockReader(request.param, programs.s3fs() if request.param == "s3fs" else None)


def _serve(kind: Kind, folder: Path) -> Iterator[Server]:
    with serve(kind, folder) as server:
        # The client's threads and what they wait on stay for the life of the process: they are there before a test looks at what is left.
        server.make_bucket().client().list().collect()
        yield server
