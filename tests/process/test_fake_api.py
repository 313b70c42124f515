"""
The whole of: that the fake API server is as good as a real one, as far as the operator's access relies on it; and what the access does
about what only the fake does on demand.

Called from: pytest. tests/cluster/test_api_access.py is the same for a real server.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pillion_operator.cluster.client import Client
from support.api_contract import Access, ApiContract, config_map, data, followed
from support.api_faults import ApiFaults, Network
from support.deadlines import Deadline, soon
from support.fake_api import FakeApi, write_kubeconfig
from support.proxy import Proxy


@pytest.fixture
def server() -> Iterator[FakeApi]:
    """A fake that has a past which it knows no more."""
    with FakeApi() as found:
        found.forget()
        yield found


@pytest.fixture
def access(server: FakeApi, tmp_path: Path) -> Access:
    return Access(server.kubeconfig(tmp_path), "team-a")


class TestContract(ApiContract):
    """The contract, on the fake."""

    @pytest.fixture
    def access(self, server: FakeApi, tmp_path: Path) -> Access:
        return Access(server.kubeconfig(tmp_path), "team-a")


class TestFaults(ApiFaults):
    """The faults, before the fake."""

    @pytest.fixture
    def network(self, server: FakeApi, access: Access, tmp_path: Path) -> Iterator[Network]:
        with Proxy("127.0.0.1", server.port) as proxy:
            through = write_kubeconfig(tmp_path, {"server": f"http://127.0.0.1:{proxy.port}"})
            yield Network(proxy, Access(through, access.namespace), access)


def test_a_forgotten_past_is_listed_again(server: FakeApi, access: Access) -> None:
    """When the server no longer knows what came since, all is listed, and what went away meanwhile is told as a change."""

    async def scenario(api: Client) -> None:
        for name in ("ours-1", "ours-2"):
            server.put(f"{access.config_maps}/{name}", config_map(name, a="1"))
        async with followed(api, access) as (cache, changes):
            server.be_silent()
            server.remove(f"{access.config_maps}/ours-1")
            server.put(f"{access.config_maps}/ours-2", config_map("ours-2", a="2"))
            server.put(f"{access.config_maps}/ours-3", config_map("ours-3"))
            assert len(cache) == 2
            changes.clear()
            server.forget()
            server.be_silent(False)
            server.end_streams()
            # What went away is known behind the last page.
            await soon(lambda: cache.get("team-a", "ours-1") is None, Deadline.API, "the whole new list")
            assert cache.get("team-a", "ours-3") == {}
            assert cache.get("team-a", "ours-2") == {"a": "2"}
            assert sorted(changes) == [("ours-1", True, False), ("ours-2", True, True), ("ours-3", False, True)]
            assert server.count("list") == 2

    access.run(scenario)


def test_a_server_that_refuses_is_asked_less_and_less(server: FakeApi, access: Access) -> None:
    """A server that answers with errors is not asked in a tight loop, and what is known stays known."""

    async def scenario(api: Client) -> None:
        server.put(f"{access.config_maps}/ours-1", config_map("ours-1"))
        async with followed(api, access) as (cache, _):
            server.refuse(500)
            server.end_streams()
            begun = len(server.requests)
            await soon(lambda: len(server.requests) >= begun + 4, Deadline.API, "some attempts")
            assert len(server.requests) < begun + 8
            assert len(cache) == 1
            server.put(f"{access.config_maps}/ours-2", config_map("ours-2"))
            server.refuse(0)
            await soon(lambda: len(cache) == 2, Deadline.API, "the server to be well again")

    access.run(scenario)


def test_an_api_server_that_is_started_anew_is_found_again(server: FakeApi, access: Access) -> None:
    """Across a restart the cache keeps what it knows, and then catches up without a list."""

    async def scenario(api: Client) -> None:
        server.put(f"{access.config_maps}/ours-1", config_map("ours-1"))
        async with followed(api, access) as (cache, _):
            server.stop()
            assert len(cache) == 1
            server.put(f"{access.config_maps}/ours-2", config_map("ours-2"))
            server.start()
            await soon(lambda: len(cache) == 2, Deadline.API, "the change of meanwhile")
            assert server.count("list") == 1

    access.run(scenario)


def test_one_object_that_cannot_be_read_costs_no_other(server: FakeApi, access: Access) -> None:
    """An error of ours about one object is told, and the cache has all the others."""

    async def scenario(api: Client) -> None:
        server.put(f"{access.config_maps}/ours-1", config_map("ours-1") | {"data": 5})
        server.put(f"{access.config_maps}/ours-2", config_map("ours-2", a="1"))
        async with followed(api, access) as (cache, _):
            assert [cache.get("team-a", name) for name in ("ours-1", "ours-2")] == [None, {"a": "1"}]
            server.put(f"{access.config_maps}/ours-1", config_map("ours-1", a="2"))
            await soon(lambda: len(cache) == 2, Deadline.API, "the object to be readable")

    with pytest.raises(TypeError):
        data(config_map("ours-1") | {"data": 5})
    access.run(scenario)


def test_an_event_of_many_megabytes_is_one_event(server: FakeApi, access: Access) -> None:
    """An object as large as etcd takes comes through a watch whole."""

    async def scenario(api: Client) -> None:
        async with followed(api, access) as (cache, _):
            server.put(f"{access.config_maps}/ours-1", config_map("ours-1", a="x" * 3_000_000))
            await soon(lambda: len(cache) == 1, Deadline.API, "the object")

    access.run(scenario)
