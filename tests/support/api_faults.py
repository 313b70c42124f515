"""
The whole of: what the operator's access to an API server outlives, as tests with a network in between that breaks.

Called from: a class of a test module that inherits `ApiFaults` and gives the fixture `network`.
Must never: need more of the server than to be there.
"""

import asyncio
from dataclasses import dataclass

import pytest

from pillion_operator.cluster import client, lease
from pillion_operator.cluster.client import Client
from support.api_contract import Access, config_map, followed, running
from support.deadlines import Deadline, soon
from support.proxy import Proxy

IDLE_S = 1.5
"""Silence after which a connection is dead in these tests, so that they need not wait for the real bound."""
TIMING = lease.Timing(lifetime_s=4, renew_s=0.5, deadline_s=2.5, retry_s=0.3)


@dataclass(frozen=True, slots=True)
class Network:
    """
    Two ways to one API server.
    """

    proxy: Proxy
    through: Access
    """By the proxy."""
    direct: Access
    """Past it."""


async def answered_again(api: Client, network: Network) -> None:
    """
    The network comes back, breaks what was left of old connections, and requests are answered.
    """
    network.proxy.cut()
    network.proxy.mend()
    with pytest.raises(client.NotFound):
        await api.get(f"{network.through.config_maps}/ours")


class ApiFaults:
    """
    Inherited by a test class for each server.
    """

    @pytest.fixture
    def network(self) -> Network:
        """
        Raises:
          NotImplementedError: the class that inherits this has to say where the server is.
        """
        raise NotImplementedError

    def test_a_cache_goes_on_after_a_broken_connection(self, network: Network) -> None:
        """The cache reports the changes during a broken connection, and forgets no object in that time."""

        async def scenario(api: Client) -> None:
            async with await Client.connect(str(network.direct.kubeconfig)) as other:
                maps = network.direct.config_maps
                await other.create(maps, config_map("ours-1"))
                await other.create(maps, config_map("ours-2"))
                async with followed(api, network.through) as (cache, _):
                    network.proxy.refuse()
                    await other.delete(f"{maps}/ours-1")
                    await other.create(maps, config_map("ours-3"))
                    with pytest.raises(client.Unreachable):
                        await api.get(maps)
                    assert cache.synced.is_set()
                    assert len(cache) == 2
                    network.proxy.mend()
                    await soon(
                        lambda: cache.get(network.direct.namespace, "ours-3") is not None,
                        Deadline.API,
                        "what was made meanwhile",
                    )
                    await soon(lambda: len(cache) == 2, Deadline.API, "what was removed meanwhile")
                    network.proxy.cut()
                    await other.create(maps, config_map("ours-4"))
                    await soon(lambda: len(cache) == 3, Deadline.API, "what was made after a cut")

        network.through.run(scenario)

    def test_a_cache_notices_a_connection_that_died_in_silence(self, network: Network) -> None:
        """A stream on which nothing comes is taken for dead after a while, and another one is opened."""

        async def scenario(api: Client) -> None:
            async with (
                await Client.connect(str(network.direct.kubeconfig)) as other,
                followed(api, network.through, idle_s=IDLE_S) as (cache, _),
            ):
                network.proxy.freeze()
                await other.create(network.direct.config_maps, config_map("ours-1"))
                network.proxy.mend()
                assert len(cache) == 0
                await soon(lambda: len(cache) == 1, Deadline.API, "what happened in the silence")
            await answered_again(api, network)

        network.through.run(scenario)

    def test_a_request_on_a_dead_connection_has_a_bound(self, network: Network) -> None:
        """Nothing waits for a server that does not answer longer than it said."""

        async def scenario(api: Client) -> None:
            await api.list(network.through.config_maps)
            network.proxy.freeze()
            with pytest.raises(client.Unreachable):
                await api.get(f"{network.through.config_maps}/ours", timeout_s=0.5)
            await answered_again(api, network)

        network.through.run(scenario)

    def test_a_holder_that_is_cut_off_ends_before_another_begins(self, network: Network) -> None:
        """At no moment do two replicas hold the lease: who cannot renew gives up first, then another takes it."""

        async def scenario(api: Client) -> None:
            async with await Client.connect(str(network.direct.kubeconfig)) as other:
                first = lease.Lease(api, network.through.namespace, "ours", "first", TIMING)
                second = lease.Lease(other, network.through.namespace, "ours", "second", TIMING)
                loop = asyncio.get_running_loop()
                await first.acquire()
                async with running(first.renew()):
                    with pytest.raises(TimeoutError):
                        # It has seen that the first holds it.
                        await asyncio.wait_for(second.acquire(), TIMING.renew_s * 2)
                    taking = asyncio.ensure_future(second.acquire())
                    network.proxy.freeze()
                    await asyncio.wait_for(first.lost.wait(), Deadline.API.s)
                    lost_s = loop.time()
                    assert not first.held
                    assert not taking.done()
                    await asyncio.wait_for(taking, Deadline.API.s)
                    assert second.held
                    assert loop.time() > lost_s
                await second.release()
                await answered_again(api, network)

        network.through.run(scenario)
