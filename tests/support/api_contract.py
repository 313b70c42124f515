"""
The whole of: what the operator's access to an API server relies on, as tests that a fake and a real server pass alike.

Called from: a class of a test module that inherits `ApiContract` and gives the fixture `access`.
Must never: need more of a cluster than its API server, or anything that only a fake can do.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pillion_operator.cluster import client, events, lease, reflector
from pillion_operator.cluster.client import Client, Json
from support.deadlines import Deadline, soon


@dataclass(frozen=True, slots=True)
class Access:
    """
    A way to an API server, and a namespace that is empty.
    """

    kubeconfig: Path
    namespace: str
    younger: str = ""
    """Path of a resource that came after the server's first version; empty: config maps are one."""

    @property
    def config_maps(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/configmaps"

    def run(self, scenario: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
        """
        Run a test's scenario with a client.
        """

        async def running() -> None:
            async with await Client.connect(str(self.kubeconfig)) as api:
                await scenario(api)

        asyncio.run(running())


def config_map(name: str, *, labels: dict[str, str] | None = None, **data: str) -> Json:
    metadata: Json = {"name": name} | ({"labels": labels} if labels else {})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def data(found: Json) -> dict[str, str]:
    return dict(found.get("data") or {})


@contextlib.asynccontextmanager
async def running(*parts: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """
    Tasks that are there while the block runs, and have not failed by its end.
    """
    tasks = [asyncio.ensure_future(each) for each in parts]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def followed(
    api: Client, access: Access, **options: Any
) -> AsyncGenerator[tuple[reflector.Reflector[dict[str, str]], list[tuple[str, bool, bool]]]]:
    """
    A synced reflector of the namespace's ConfigMaps as name -> data, and its changes: name, was there, is there.
    """
    changes: list[tuple[str, bool, bool]] = []
    found: reflector.Reflector[dict[str, str]] = reflector.Reflector(
        api,
        access.config_maps,
        lambda each: data(each) if each["metadata"]["name"].startswith("ours") else None,
        on_change=lambda key, old, new: changes.append((key[1], old is not None, new is not None)),
        **options,
    )
    async with running(found.run()):
        await asyncio.wait_for(found.synced.wait(), Deadline.API.s)
        yield found, changes


class ApiContract:
    """
    Inherited by a test class for each server.
    """

    @pytest.fixture
    def access(self) -> Access:
        """
        Raises:
          NotImplementedError: the class that inherits this has to say where the server is.
        """
        raise NotImplementedError

    def test_an_object_is_made_read_changed_and_removed(self, access: Access) -> None:
        """Each request answers with the object as it is afterwards, all of it, or with its metadata alone."""

        async def scenario(api: Client) -> None:
            path = f"{access.config_maps}/ours"
            made = await api.create(access.config_maps, config_map("ours", a="1"))
            assert made == await api.get(path)
            assert "data" not in await api.get(path, metadata_only=True)
            assert data(await api.patch(path, {"data": {"a": None, "b": "2"}})) == {"b": "2"}
            newest = await api.get(path)
            assert data(await api.replace(path, newest | {"data": {"c": "3"}})) == {"c": "3"}
            await api.delete(path, uid=made["metadata"]["uid"])
            with pytest.raises(client.NotFound):
                await api.get(path)

        access.run(scenario)

    def test_a_write_to_another_version_is_a_conflict(self, access: Access) -> None:
        """A changed object is not overwritten, an existing one is not created again, and another object of the same name is not removed."""

        async def scenario(api: Client) -> None:
            path = f"{access.config_maps}/ours"
            old = await api.create(access.config_maps, config_map("ours", a="1"))
            await api.patch(path, {"data": {"a": "2"}})
            with pytest.raises(client.Conflict):
                await api.replace(path, old | {"data": {"a": "3"}})
            with pytest.raises(client.Conflict):
                await api.create(access.config_maps, config_map("ours"))
            with pytest.raises(client.Conflict):
                await api.delete(path, uid="00000000-0000-0000-0000-000000000000")
            assert data(await api.get(path)) == {"a": "2"}

        access.run(scenario)

    def test_a_list_is_whole_however_long(self, access: Access) -> None:
        """More objects than an answer holds come in several, and none is lost or doubled."""

        async def scenario(api: Client) -> None:
            number = client.PAGE_SIZE + 20
            for begin in range(0, number, 20):
                names = [f"ours-{index:04}" for index in range(begin, begin + 20)]
                await asyncio.gather(*(api.create(access.config_maps, config_map(name)) for name in names))
            pages = [len(page["items"]) async for page in api.pages(access.config_maps, metadata_only=True)]
            assert max(pages) == client.PAGE_SIZE
            found = await api.list(access.config_maps, metadata_only=True)
            names = [each["metadata"]["name"] for each in found["items"] if each["metadata"]["name"].startswith("ours")]
            assert len(names) == len(set(names)) == number
            async with followed(api, access, metadata_only=True) as (cache, _):
                assert len(cache) == number

        access.run(scenario)

    def test_a_cache_follows_what_happens(self, access: Access) -> None:
        """The cache reports each created, changed and removed object, with the object before. It does not report objects that it does not keep."""

        async def scenario(api: Client) -> None:
            await api.create(access.config_maps, config_map("ours-1", a="1"))
            async with followed(api, access) as (cache, changes):
                assert cache.get(access.namespace, "ours-1") == {"a": "1"}
                await api.create(access.config_maps, config_map("theirs", a="1"))
                await api.create(access.config_maps, config_map("ours-2", a="1"))
                await api.patch(f"{access.config_maps}/ours-2", {"data": {"a": "2"}})
                await soon(lambda: cache.get(access.namespace, "ours-2") == {"a": "2"}, Deadline.API, "the change")
                await api.delete(f"{access.config_maps}/ours-2")
                await soon(lambda: cache.get(access.namespace, "ours-2") is None, Deadline.API, "the removal")
                assert len(cache) == 1
                assert cache.get(access.namespace, "theirs") is None
                expected = [("ours-1", False, True), ("ours-2", False, True), ("ours-2", True, True)]
                assert changes == [*expected, ("ours-2", True, False)]

        access.run(scenario)

    def test_a_cache_of_one_name_sees_no_other(self, access: Access) -> None:
        """A field selector is kept to by the list and by the watch."""

        async def scenario(api: Client) -> None:
            await api.create(access.config_maps, config_map("ours-1"))
            async with followed(api, access, field_selector="metadata.name=ours-2") as (cache, _):
                assert len(cache) == 0
                await api.create(access.config_maps, config_map("ours-3"))
                await api.create(access.config_maps, config_map("ours-2"))
                await soon(lambda: len(cache) == 1, Deadline.API, "the object of that name")
                assert cache.get(access.namespace, "ours-2") == {}

        access.run(scenario)

    def test_a_watch_that_ends_goes_on_where_it_was(self, access: Access) -> None:
        """A stream that the server ends after a second is begun again without a list, and no change is seen twice."""

        async def scenario(api: Client) -> None:
            async with followed(api, access, watch_s=1.2) as (cache, changes):
                for index in range(4):
                    await api.create(access.config_maps, config_map(f"ours-{index}"))
                    seen, number = cache.last_event_s, index + 1
                    await soon(lambda number=number: len(cache) == number, Deadline.API, "the new object")  # type: ignore[misc]
                    await soon(lambda seen=seen: cache.last_event_s > seen, Deadline.API, "the stream's end")  # type: ignore[misc]
                assert len(changes) == 4

        access.run(scenario)

    def test_a_watch_of_less_than_a_second_ends(self, access: Access) -> None:
        """A bound below the API's unit is rounded up to it; zero would be the server's own bound of half an hour."""

        async def scenario(api: Client) -> None:
            version = (await api.list(access.config_maps))["metadata"]["resourceVersion"]
            async with asyncio.timeout(Deadline.API.s):
                async for _ in api.watch(access.config_maps, resource_version=version, timeout_s=0.4):
                    pass

        access.run(scenario)

    def test_a_watch_from_a_forgotten_version_is_gone(self, access: Access) -> None:
        """A version that the server knows no more is an error of its own kind, so that a list follows."""

        async def scenario(api: Client) -> None:
            await api.create(access.config_maps, config_map("ours"))
            path = access.younger or access.config_maps
            with pytest.raises(client.Gone):
                async for _ in api.watch(path, resource_version="1", timeout_s=5):
                    pass

        access.run(scenario)

    def test_one_of_two_holds_a_lease_and_the_other_follows_at_once(self, access: Access) -> None:
        """While one holds it the other waits; what is released is taken without waiting for the lease's end."""

        async def scenario(api: Client) -> None:
            first, second = (lease.Lease(api, access.namespace, "ours", name) for name in ("first", "second"))
            async with first:
                assert first.held
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(second.acquire(), lease.RETRY_S * 2)
                assert not second.held
                waiting = asyncio.ensure_future(second.acquire())
            begun = asyncio.get_running_loop().time()
            await asyncio.wait_for(waiting, Deadline.API.s)
            assert asyncio.get_running_loop().time() - begun < lease.LIFETIME_S / 2
            assert second.held
            assert not first.held
            path = f"/apis/coordination.k8s.io/v1/namespaces/{access.namespace}/leases/ours"
            spec = (await api.get(path))["spec"]
            assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("second", 1)
            await second.release()

        access.run(scenario)

    def test_a_holder_whose_lease_was_taken_knows_it(self, access: Access) -> None:
        """A lease that says another holder is lost, and is not fought for."""

        async def scenario(api: Client) -> None:
            held = lease.Lease(api, access.namespace, "ours", "first", lease.Timing(renew_s=0.5))
            path = f"/apis/coordination.k8s.io/v1/namespaces/{access.namespace}/leases/ours"
            async with held:
                await api.patch(path, {"spec": {"holderIdentity": "second"}})
                await asyncio.wait_for(held.lost.wait(), Deadline.API.s)
                assert not held.held
            assert (await api.get(path))["spec"]["holderIdentity"] == "second"

        access.run(scenario)

    def test_what_is_said_often_is_one_event_with_a_count(self, access: Access) -> None:
        """The same words about the same object are one Event; other words are another."""

        async def scenario(api: Client) -> None:
            about = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "name": "train",
                "namespace": access.namespace,
                "uid": "1",
            }
            told = events.Events(api, "replica-1")
            for _ in range(3):
                told.post(about, "Injected", "the same")
            told.post(about, "PolicyMissing", "another", warning=True)
            async with running(told.run()):
                await told.flush()
            found = (await api.list(f"/apis/events.k8s.io/v1/namespaces/{access.namespace}/events"))["items"]
            ours = {each["note"]: each for each in found if each["reportingController"] == events.CONTROLLER}
            assert ours.keys() == {"the same", "another"}
            assert ours["the same"]["series"]["count"] == 3
            assert ours["another"]["type"] == "Warning"
            assert ours["another"]["regarding"]["name"] == "train"

        access.run(scenario)
