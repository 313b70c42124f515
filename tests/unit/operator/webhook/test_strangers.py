"""
The whole of: what those can do who reach the webhook's port, and are not the API server: hold connections, send bodies that never end,
and send reviews that they made up.

Called from: pytest. Server and client are real, on the loopback interface.
"""

import asyncio
import contextlib
import datetime
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from pillion_operator import listener
from pillion_operator.certificates import issue, serving
from pillion_operator.cluster import client
from pillion_operator.injection import checkpoint_policy
from pillion_operator.settings import Settings
from pillion_operator.webhook import callers, policies, refusals, server
from support import served
from support.api_in_memory import ApiInMemory

Json = dict[str, Any]
JOB: Final = {"apiVersion": "batch/v1", "kind": "Job", "name": "train", "uid": "uid-1", "controller": True}
JOB_PATH: Final = "/apis/batch/v1/namespaces/team-a/jobs/train"
POD: Final[Json] = {
    "metadata": {"generateName": "t-", "annotations": {"pillion.dev/policy": "llm"}, "ownerReferences": [JOB]},
    "spec": {"containers": [{"name": "trainer", "image": "example/train:1"}]},
}
KNOWN: Final = checkpoint_policy.from_object(
    {
        "apiVersion": "pillion.dev/v1alpha1",
        "kind": "CheckpointPolicy",
        "metadata": {"name": "llm"},
        "spec": {
            "trigger": {"periodSteps": 5},
            "staging": {"sizeLimit": "1Gi"},
            "storage": {"persistentVolumeClaim": {"claimName": "c"}},
        },
    }
)


class OnePolicy:
    """What is needed of `policies.Policies`: the policy llm of team-a."""

    async def find(self, namespace: str, name: str) -> checkpoint_policy.CheckpointPolicy | None:
        return KNOWN if (namespace, name) == ("team-a", "llm") else None


class Posted:
    """What is needed of `events.Events`."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, str]] = []

    def post(self, about: Json, reason: str, message: str, *, warning: bool = False) -> None:
        del message, warning
        self.said.append((about["namespace"], f"{about['kind']}/{about['name']}", reason))


class Asked:
    """A webhook's server, and whom it said something to."""

    def __init__(self, **settings: str) -> None:
        self.posted, self.api = Posted(), ApiInMemory()
        told: Any = self.posted
        api: Any = self.api
        found: Any = OnePolicy()
        self.refusals = refusals.Refusals(api, told)
        self.server = server.Server(found, self.refusals, Settings(**settings))  # type: ignore[arg-type]  # all are text
        self.application = self.server.application()


def review(pod: Json = POD, namespace: str = "team-a") -> bytes:
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    asked = {"uid": "42", "kind": kind, "operation": "CREATE", "namespace": namespace, "object": pod}
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked}).encode()


def run(scenario: Callable[[Asked, served.Served, aiohttp.ClientSession], Awaitable[None]], **settings: str) -> None:
    async def within() -> None:
        asked = Asked(**settings)
        authority = settings.get("webhook_client_ca", "")
        async with (
            served.serve(asked.application, client_authority=authority) as port,
            aiohttp.ClientSession() as session,
        ):
            await scenario(asked, port, session)

    asyncio.run(within())


def head(length: int) -> bytes:
    return f"POST /mutate HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


@pytest.fixture(autouse=True)
def _short_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused sender is waited for no longer than a test needs."""
    monkeypatch.setattr(listener, "LINGER_S", 0.1)


# --- bodies


def test_a_body_that_does_not_come_whole_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the deadline it is answered with 408, and the connection ends; others are answered meanwhile."""
    monkeypatch.setattr(server, "BODY_S", 0.2)

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        reader, writer = await port.connect()
        writer.write(head(1000) + b"{")
        assert (await port.post(session, review()))[0] == 200
        assert b" 408 " in await served.read_to_end(reader)
        writer.close()
        assert asked.server._bodies._held == set()

    run(scenario)


def test_a_body_that_says_that_it_is_too_long_is_not_read() -> None:
    """Its length is in its head, or it passes the bound: 413 either way."""

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        reader, writer = await port.connect()
        writer.write(head(server.MAX_BODY_BYTES + 1))
        assert b" 413 " in await served.read_to_end(reader)
        writer.close()

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b" " * 65536

        with contextlib.suppress(aiohttp.ClientError):
            assert (await port.post(session, endless()))[0] == 413
        assert asked.server._bodies._num_bytes == 0

    run(scenario)


def test_bodies_that_hang_make_room_for_one_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of all is bounded, and the one that has been coming the longest goes: the API server's is answered."""
    monkeypatch.setattr(server, "MAX_BODIES_BYTES", 200_000)
    monkeypatch.setattr(server, "MAX_BODY_BYTES", 150_000)

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        held = asked.server._bodies
        slow = []
        for _ in range(4):
            reader, writer = await port.connect()
            writer.write(head(150_000) + b"x" * 120_000)
            await writer.drain()
            slow.append((reader, writer))
            while not any(each.num_bytes == 120_000 for each in held._held):
                await asyncio.sleep(0)
        assert held._num_bytes <= 200_000
        body = review(POD | {"padding": "x" * 100_000})
        assert (await port.post(session, body))[0] == 200
        for reader, writer in slow[:3]:
            assert b" 503 " in await served.read_to_end(reader)
            writer.close()
        slow[3][1].close()

    run(scenario)


def test_requests_that_hang_make_room_for_one_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is bounded as well as their bytes."""
    monkeypatch.setattr(server, "MAX_BODIES", 2)

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        slow = []
        for number in range(2):
            reader, writer = await port.connect()
            writer.write(head(1000))
            slow.append((reader, writer))
            while len(asked.server._bodies._held) <= number:
                await asyncio.sleep(0)
        assert (await port.post(session, review()))[0] == 200
        assert b" 503 " in await served.read_to_end(slow[0][0])
        for _, writer in slow:
            writer.close()

    run(scenario)


def test_a_compressed_body_is_not_unpacked() -> None:
    """Some bytes could become gigabytes; the API server compresses nothing."""

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        status, _ = await port.post(session, b"\x1f\x8b garbage", {"Content-Encoding": "gzip"})
        assert status == 400

    run(scenario)


# --- connections


def test_a_stranger_cannot_fill_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Bodies that are given up, requests that are none, and handshakes that fail are no warnings."""
    monkeypatch.setattr(server, "MAX_BODIES", 1)
    caplog.set_level("WARNING")

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        first, second, third = [await port.connect() for _ in range(3)]
        first[1].write(head(1000) + b"{")
        while not asked.server._bodies._held:
            await asyncio.sleep(0)
        second[1].write(head(1000) + b"{")
        await served.read_to_end(first[0])
        third[1].write(b"what is this?\r\n\r\n")
        await served.read_to_end(third[0])
        plain = await asyncio.open_connection(served.HOST, port.port)
        plain[1].write(b"GET / HTTP/1.1\r\n\r\n")
        await served.read_to_end(plain[0])
        for _, writer in (first, second, third, plain):
            writer.close()

    run(scenario)
    assert [record.getMessage() for record in caplog.records] == []


def test_connections_that_ask_nothing_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many, the oldest that was never answered goes, and not the API server's, which is older."""
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 3)

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        assert (await port.post(session, review()))[0] == 200
        strangers = [await port.connect() for _ in range(4)]
        assert await served.read_to_end(strangers[0][0]) == b""
        assert await served.read_to_end(strangers[1][0]) == b""
        connection = next(iter(session.connector._conns.values()))[0][0]  # type: ignore[union-attr]  # there is one
        assert connection.is_connected()
        assert (await port.post(session, review()))[0] == 200
        for _, writer in strangers:
            writer.close()

    run(scenario)


def test_handshakes_that_hang_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than so many are closed at once, those that hang end after a while, and then there is room again."""
    monkeypatch.setattr(listener, "MAX_HANDSHAKES", 2)
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.3)

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        silent = [await asyncio.open_connection(served.HOST, port.port) for _ in range(2)]
        with pytest.raises((aiohttp.ClientError, OSError)):
            await port.post(session, review())
        for reader, _ in silent:
            assert await served.read_to_end(reader) == b""
        assert (await port.post(session, review()))[0] == 200
        for _, writer in silent:
            writer.close()

    run(scenario)


def test_what_comes_with_the_end_of_a_handshake_is_not_lost() -> None:
    """The protocol that speaks from then on is given all of it, in order, as if it had been there from the start."""
    said: list[object] = []

    class Speaks(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            said.append("made")

        def data_received(self, data: bytes) -> None:
            said.append(data)

        def eof_received(self) -> None:
            said.append("end")

    class Handed(asyncio.Transport):
        def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
            said.append(type(protocol))

    guest = listener._Guest(lambda _guest, _transport: None)
    guest.data_received(b"POST ")
    guest.data_received(b"/mutate")
    guest.eof_received()
    guest.hand_over(Handed(), Speaks())
    assert said == [Speaks, "made", b"POST ", b"/mutate", "end"]


# --- reviews that nobody asked about


async def looked(asked: Asked) -> None:
    """Blocks: until every refusal was looked at."""
    looking = asyncio.create_task(asked.refusals.run())
    await asked.refusals.flush()
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


@pytest.mark.parametrize(
    ("owner", "is_said"),
    [
        (JOB, True),
        (JOB | {"uid": "made-up"}, False),
        (JOB | {"name": "../jobs/train"}, False),
        (JOB | {"kind": "Node", "apiVersion": "v1"}, False),
        (JOB | {"uid": ""}, False),
    ],
    ids=["there", "of another UID", "a path", "of a kind that is not looked up", "without a UID"],
)
def test_a_refusal_is_said_on_an_owner_that_exists(monkeypatch: pytest.MonkeyPatch, owner: Json, is_said: bool) -> None:
    """The Event is there where the API server confirms the owner by its UID, and nowhere else."""
    monkeypatch.setattr(refusals, "LOOKS_PER_S", 1e9)

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        asked.api.objects[JOB_PATH] = {"metadata": {"uid": "uid-1"}}
        pod = {"metadata": {"annotations": {"pillion.dev/policy": "none"}, "ownerReferences": [owner]}, "spec": {}}
        pod["spec"] = POD["spec"]
        for _ in range(2):
            assert (await port.post(session, review(pod)))[0] == 200
        await looked(asked)
        said = ("team-a", "Job/train", "PolicyMissing")
        assert asked.posted.said == ([said, said] if is_said else [])
        assert len(asked.api.calls) <= 1

    run(scenario)


def test_an_injection_is_said_by_nobody_here() -> None:
    """A review alone is no pod: the controller says it, when the pod is there."""

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        asked.api.objects[JOB_PATH] = {"metadata": {"uid": "uid-1"}}
        status, answer = await port.post(session, review())
        assert (status, "patch" in json.loads(answer)["response"]) == (200, True)
        await looked(asked)
        assert (asked.posted.said, asked.api.calls) == ([], [])

    run(scenario)


def test_an_owner_that_cannot_be_looked_up_is_not_spoken_to() -> None:
    """The API server is away: no Event, no error, and the next refusal asks again."""

    async def scenario() -> None:
        asked = Asked()
        asked.api.fails = [client.Unreachable("away")]
        about = {key: JOB[key] for key in ("apiVersion", "kind", "name", "uid")} | {"namespace": "team-a"}
        asked.api.objects[JOB_PATH] = {"metadata": {"uid": "uid-1"}}
        for _ in range(2):
            asked.refusals.post(about, "PolicyMissing", "why")
        await looked(asked)
        assert len(asked.posted.said) == 1

    asyncio.run(scenario())


def test_made_up_names_of_policies_cost_a_bounded_number_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the burst a name that is in no cache is not asked about, and one that is in the cache is found."""
    monkeypatch.setattr(policies, "ASKED_BURST", 3.0)
    monkeypatch.setattr(policies, "ASKED_PER_S", 0.0)

    async def scenario() -> None:
        api: Any = ApiInMemory()
        found = policies.Policies(api)
        for number in range(3):
            assert await found.find("team-a", f"made-up-{number}") is None
        with pytest.raises(policies.LookupFailed, match="too many"):
            await found.find("team-a", "made-up-3")
        assert len(api.calls) == 3
        found._reflector._kept["team-a", "llm"] = KNOWN
        assert await found.find("team-a", "llm") is KNOWN

    asyncio.run(scenario())


# --- the API server's certificate


def of_client(authority: issue.Authority, name: str) -> serving.Material:
    """A certificate that a client of this name shows."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = x509.load_pem_x509_certificate(authority.certificate.encode())
    signing = serialization.load_pem_private_key(authority.key.encode(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(served.NOW - datetime.timedelta(hours=1))
        .not_valid_after(served.NOW + datetime.timedelta(hours=1))
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(signing, hashes.SHA256())
    )
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    chain = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return serving.Material(chain=chain, key=text, authority="")


def test_where_a_certificate_is_asked_for_nobody_else_is_answered() -> None:
    """Without one, and with one of another authority or name, there is no answer; with the API server's there is."""
    authority = issue.make_authority(served.NOW)

    async def scenario(asked: Asked, port: served.Served, session: aiohttp.ClientSession) -> None:
        async def ask(signed_by: issue.Authority | None, name: str) -> int:
            port.context = ssl.create_default_context(cadata=served.AUTHORITY.certificate)
            if signed_by is not None:
                serving.load(port.context, of_client(signed_by, name))
            async with aiohttp.ClientSession() as own:
                try:
                    return (await port.post(own, review()))[0]
                except (aiohttp.ClientError, OSError):
                    return 0

        assert await ask(authority, "kube-apiserver") == 200
        assert await ask(authority, "somebody") == 403
        assert await ask(served.AUTHORITY, "kube-apiserver") == 0
        assert await ask(None, "") == 0

    run(scenario, webhook_client_ca=authority.certificate, webhook_client_names="kube-apiserver,other")


@pytest.mark.parametrize(
    ("allowed", "may"), [("", True), ("a", True), ("b , c", True), ("d", False), ("x y", False), (" , ", True)]
)
def test_a_certificate_is_its_common_name_and_its_dns_names(allowed: str, may: bool) -> None:
    """One of the names is enough; an address is none."""
    certificate = {
        "subject": ((("organizationName", "d"),), (("commonName", "a"),)),
        "subjectAltName": (("DNS", "b"), ("IP Address", "d")),
    }
    assert callers.may_ask(certificate, allowed) is may
    assert not callers.may_ask(None, allowed)
    assert not callers.may_ask({}, allowed)
