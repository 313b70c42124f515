"""
The whole of: a server's TLS context that takes new certificates while it serves.

Called from: pytest. The handshakes are real, and run in memory.
"""

import datetime
import ssl
from datetime import UTC

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from kubernetes.aio.client import configuration

from pillion_operator.certificates import issue, serving
from pillion_operator.cluster import client

NAME = "pillion-webhook.system.svc"
NOW = datetime.datetime.now(UTC)
AUTHORITY = issue.make_authority(NOW)


def material() -> serving.Material:
    leaf = issue.make_leaf(AUTHORITY, [NAME], NOW)
    return serving.Material(chain=leaf.chain, key=leaf.key, authority=AUTHORITY.certificate)


def rsa_material() -> serving.Material:
    """As somebody else might make it, with a key of another kind."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(hours=1))
        .not_valid_after(NOW + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    chain = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return serving.Material(chain=chain, key=text, authority=chain)


@pytest.fixture
def told() -> list[serving.Material]:
    return []


@pytest.fixture
def server(told: list[serving.Material]) -> serving.Serving:
    """A server that nobody has given a certificate."""
    api = client.Client(configuration.Configuration())
    return serving.Serving(api, "system", "pillion-tls", on_change=told.append)


def handshake(server: serving.Serving, trusted: str, name: str | None = NAME) -> bytes:
    """
    The certificate that a client is shown.

    Raises:
        ssl.SSLError: there is no handshake.
    """
    context = ssl.create_default_context(cadata=trusted)
    context.check_hostname = name is not None
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = context.wrap_bio(ours, theirs, server_hostname=name)
    answering = server.context.wrap_bio(theirs, ours, server_side=True)
    for _ in range(4):
        for side in (asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return asking.getpeercert(binary_form=True) or b""


def shown(found: serving.Material) -> bytes:
    return x509.load_pem_x509_certificate(found.chain.encode()).public_bytes(serialization.Encoding.DER)


def test_no_handshake_succeeds_before_there_is_a_certificate(server: serving.Serving) -> None:
    """The context can be listened with at once; who comes too early is refused, and the server is not ready."""
    assert not server.ready
    with pytest.raises(ssl.SSLError):
        handshake(server, AUTHORITY.certificate)


@pytest.mark.parametrize("name", [NAME, None])
def test_each_handshake_gets_the_newest_certificate(
    server: serving.Serving, told: list[serving.Material], name: str | None
) -> None:
    """A new certificate is served from the next handshake on, also to a client that names no server."""
    first, second = material(), material()
    for each in (first, second):
        assert server.take(each)
        assert server.ready
        assert handshake(server, AUTHORITY.certificate, name) == shown(each)
    assert told == [first, second]


def test_a_key_of_another_kind_takes_the_place_of_the_old(server: serving.Serving) -> None:
    """No certificate of before is left beside a new one, whatever kind of key a client would like better."""
    assert server.take(material())
    other = rsa_material()
    assert server.take(other)
    assert handshake(server, other.authority) == shown(other)
    again = material()
    assert server.take(again)
    assert handshake(server, AUTHORITY.certificate) == shown(again)


def test_what_cannot_be_served_leaves_the_old_one_in_place(
    server: serving.Serving, told: list[serving.Material]
) -> None:
    """A certificate without its key, half a file, or nothing is refused, and the server goes on with what it has."""
    good, other = material(), material()
    assert server.take(good)
    for bad in (
        serving.Material(chain=other.chain, key=good.key, authority=""),
        serving.Material(chain=other.chain[: len(other.chain) // 2], key=other.key, authority=""),
        serving.Material(chain="", key="", authority=""),
    ):
        assert not server.take(bad)
        assert server.material == good
        assert handshake(server, AUTHORITY.certificate) == shown(good)
    assert told == [good]
