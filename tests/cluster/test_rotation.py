"""
The story: the leader keeps a certificate and the API server's trust in it, whoever deletes or rewrites what.

Called from: pytest. test_certificates.py is the same from outside, with pods that are admitted meanwhile.
"""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import pytest

from cluster.conftest import Api
from pillion_operator import settings
from pillion_operator.certificates import issue, rotation, serving
from pillion_operator.cluster import client
from pillion_operator.cluster.client import Client, Json, PatchKind
from support.api_contract import running
from support.deadlines import Deadline, soon

CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """A namespace with nothing in it, and a webhook configuration as a chart renders it."""

    api: Client
    settings: settings.Settings

    @property
    def secrets(self) -> str:
        return f"/api/v1/namespaces/{self.settings.namespace}/secrets"

    @property
    def configuration(self) -> str:
        return f"{CONFIGURATIONS}/{self.settings.webhook_configuration}"

    def document(self) -> Json:
        service = {"name": "pillion-webhook", "namespace": self.settings.namespace, "path": "/mutate"}
        webhook = {
            "name": "inject.pillion.dev",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Ignore",
            "clientConfig": {"service": service},
            # Nothing matches: this configuration is for its caBundle only.
            "rules": [],
        }
        metadata = {"name": self.settings.webhook_configuration}
        kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration"}
        return kind | {"metadata": metadata, "webhooks": [webhook]}

    async def material(self) -> serving.Material:
        return serving.material(await self.api.get(f"{self.secrets}/{self.settings.secret_name}"))

    async def authority(self) -> issue.Authority | None:
        return rotation.read_authority(await self.api.get(f"{self.secrets}/{self.settings.authority_secret_name}"))

    async def trusted(self) -> list[str]:
        """The certificates that the API server trusts."""
        return issue.split(rotation.trusted_now(await self.api.get(self.configuration)))

    async def delete(self, *paths: str) -> None:
        for path in paths:
            await self.api.delete(path)

    @property
    def leaf(self) -> str:
        return f"{self.secrets}/{self.settings.secret_name}"

    @property
    def signer(self) -> str:
        return f"{self.secrets}/{self.settings.authority_secret_name}"

    async def assert_good(self) -> None:
        """What is served is for our names, of our authority, and trusted."""
        material, authority = await self.material(), await self.authority()
        leaf = issue.Leaf(chain=material.chain, key=material.key)
        assert issue.decide(authority, leaf, self.settings.server_names(), datetime.now(UTC)) is issue.Due.KEEP
        assert authority is not None
        assert authority.certificate in await self.trusted()
        assert issue.split(material.authority) == await self.trusted()


Scenario = Callable[[World], Coroutine[Any, Any, None]]


@pytest.fixture
def run(api: Api) -> Callable[[Scenario], None]:
    """Runs a scenario in a world of its own."""
    environ = {"PILLION_NAMESPACE": api.namespace, "PILLION_WEBHOOK_CONFIGURATION": api.namespace}
    found = settings.from_env(environ)

    @contextlib.asynccontextmanager
    async def world() -> AsyncGenerator[World]:
        async with await Client.connect(str(api.kubeconfig)) as access:
            made = World(access, found)
            await access.create(CONFIGURATIONS, made.document())
            try:
                yield made
            finally:
                with contextlib.suppress(client.NotFound):
                    await access.delete(made.configuration)

    async def running_it(scenario: Scenario) -> None:
        async with world() as made:
            await scenario(made)

    return lambda scenario: asyncio.run(running_it(scenario))


def test_everything_is_made_once(run: Callable[[Scenario], None]) -> None:
    """The first look makes authority, trust and leaf; the next one writes nothing."""

    async def scenario(world: World) -> None:
        leader = rotation.Rotation(world.api, world.settings)
        await asyncio.wait_for(leader.once(), Deadline.API.s)
        await world.assert_good()
        before = [await world.api.get(path) for path in (world.leaf, world.signer, world.configuration)]
        await leader.once()
        assert before == [await world.api.get(path) for path in (world.leaf, world.signer, world.configuration)]

    run(scenario)


def test_a_deleted_certificate_is_made_anew_by_the_same_authority(run: Callable[[Scenario], None]) -> None:
    """Whoever deletes the certificate gets another, and nobody has to trust anyone new."""

    async def scenario(world: World) -> None:
        leader = rotation.Rotation(world.api, world.settings)
        await leader.once()
        before, trusted = await world.material(), await world.trusted()
        await world.delete(world.leaf)
        await leader.once()
        await world.assert_good()
        assert (await world.material()).chain != before.chain
        assert await world.trusted() == trusted

    run(scenario)


@pytest.mark.parametrize("also_the_leaf", [False, True])
def test_a_new_authority_is_trusted_before_anything_of_it_is_served(
    run: Callable[[Scenario], None], also_the_leaf: bool
) -> None:
    """Between trust and leaf lies the time that API servers need; whatever was served is trusted all along."""

    async def scenario(world: World) -> None:
        await rotation.Rotation(world.api, world.settings).once()
        (old,), served = await world.trusted(), await world.material()
        await world.delete(world.signer, *([world.leaf] if also_the_leaf else []))
        leader = rotation.Rotation(world.api, world.settings, propagation_s=Deadline.API.s)
        looking = asyncio.ensure_future(leader.once())
        async with asyncio.timeout(Deadline.API.s):
            while len(await world.trusted()) < 2:
                assert not looking.done()
        assert (await world.trusted())[1] == old
        with contextlib.suppress(client.NotFound):
            assert await world.material() == served
        # As if it had died there: whoever leads next goes on, without another authority.
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        both = await world.trusted()
        await rotation.Rotation(world.api, world.settings, propagation_s=0.1).once()
        await world.assert_good()
        assert await world.trusted() == both

    run(scenario)


def test_what_others_undo_is_done_again_at_once(run: Callable[[Scenario], None]) -> None:
    """A chart that renders the configuration anew, a deleted Secret, a broken one: each is mended without waiting for a look."""

    async def scenario(world: World) -> None:
        async with running(rotation.Rotation(world.api, world.settings, propagation_s=0.1).run()):

            async def mended(undo: Callable[[], Coroutine[Any, Any, object]]) -> None:
                await undo()
                async with asyncio.timeout(Deadline.API.s):
                    while True:
                        with contextlib.suppress(client.NotFound, AssertionError):
                            await world.assert_good()
                            return

            async def nothing() -> None:
                return None

            await mended(nothing)
            bundle = [{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]
            await mended(functools.partial(world.api.patch, world.configuration, bundle, kind=PatchKind.JSON))
            await mended(functools.partial(world.delete, world.leaf))
            await mended(functools.partial(world.delete, world.signer, world.leaf))
            broken = {"data": {"tls.key": "YnJva2Vu"}}
            await mended(functools.partial(world.api.patch, world.leaf, broken))

            async def anew() -> None:
                await world.delete(world.configuration)
                await world.api.create(CONFIGURATIONS, world.document())

            await mended(anew)

    run(scenario)


def test_two_leaders_at_once_end_with_one_authority(run: Callable[[Scenario], None]) -> None:
    """Where two believe that they lead, no one overwrites the other, and what is there in the end fits together."""

    async def scenario(world: World) -> None:
        leaders = [rotation.Rotation(world.api, world.settings, propagation_s=0.1) for _ in range(2)]
        for _ in range(3):
            for result in await asyncio.gather(*(each.once() for each in leaders), return_exceptions=True):
                assert result is None or isinstance(result, client.Conflict), result
        await leaders[0].once()
        await world.assert_good()

    run(scenario)


def test_the_server_takes_what_the_leader_makes(run: Callable[[Scenario], None]) -> None:
    """A replica that follows the Secret serves each new certificate, and goes on with the last when there is none."""

    async def scenario(world: World) -> None:
        leader = rotation.Rotation(world.api, world.settings)
        server = serving.Serving(world.api, world.settings.namespace, world.settings.secret_name)
        async with running(server.run()):
            for _ in range(2):
                await leader.once()
                made = await world.material()
                await soon(lambda made=made: server.material == made, Deadline.API, "the certificate")  # type: ignore[misc]
                assert server.ready
                await world.delete(world.leaf)
            assert server.ready

    run(scenario)
