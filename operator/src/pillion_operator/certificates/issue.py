"""
The whole of: issuing authorities and certificates, and deciding when new ones are due. Input and output are PEM and times.

Called from: `rotation`, which writes them; `serving`, for the end of the served certificate.
Must never: read a clock, a file or an API server; raise for a broken certificate: a new one is due then.

    authority    signs leaves; its certificate is in the caBundle and in every injected pod, its key in one Secret
    leaf         the serving certificate of the webhook and of the report endpoint
    cross        the new authority's key, signed by the old authority. A pod that was injected earlier trusts only the
                 old one, and so still trusts a new leaf. It is part of the leaf's chain.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFE: Final = timedelta(days=3650)
"""Lifetime of an authority. It is long, because injected pods keep trusting the authority of their injection."""
LEAF_LIFE: Final = timedelta(days=90)
RENEW_AT: Final = 2 / 3
"""Fraction of a lifetime after which the next certificate is made. Of 90 days, 30 are left for repairs."""
BACKDATED: Final = timedelta(hours=1)
"""Time by which a certificate is backdated, because the clocks of nodes differ."""
MAX_PREVIOUS: Final = 3
"""
Maximum number of previous authorities that stay trusted, newest first. Without a limit the bundle would outgrow the
configuration.
"""


class Due(StrEnum):
    """The certificates that are due."""

    KEEP = "Keep"
    RENEW_LEAF = "RenewLeaf"
    RENEW_AUTHORITY = "RenewAuthority"
    """A leaf too, as the old one is not of the new authority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """An authority, which signs leaves."""

    certificate: str
    """Its own, self-signed; PEM."""
    key: str
    """Private, PEM."""
    previous: tuple[str, ...] = ()
    """Certificates of authorities that are to be trusted until they end, newest first."""
    cross: str = ""
    """This authority's key, signed by the one before; empty where there was none, or its key was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A serving certificate, with its key."""

    chain: str
    """PEM; the leaf's own certificate first."""
    key: str
    """Private, PEM."""


def decide(authority: Authority | None, leaf: Leaf | None, names: Collection[str], now: datetime) -> Due:
    """Decide which certificates are due, so that a leaf for all these names can be served for long enough."""
    signer = _read(authority.certificate) if authority else None
    if authority is None or signer is None or not _is_pair(signer, authority.key) or _is_old(signer, now):
        return Due.RENEW_AUTHORITY
    served = _read(leaf.chain) if leaf else None
    if leaf is None or served is None or not _is_pair(served, leaf.key) or _is_old(served, now):
        return Due.RENEW_LEAF
    if not set(names) <= set(_names(served)) or not _is_signed_by(served, signer):
        return Due.RENEW_LEAF
    return Due.KEEP


def make_authority(now: datetime, *, before: Authority | None = None, trusted: str = "") -> Authority:
    """
    A new authority.

    Args:
        now: when.
        before: the one that it follows. What cannot be read of it is left out.
        trusted: certificates, PEM, that are trusted now, whosever they are.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    # The time distinguishes the authorities of a bundle for a reader.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"pillion {now:%Y-%m-%d %H:%M:%S}")])
    certificate = _authority(name, key.public_key(), name, key, key.public_key(), now - BACKDATED, now + AUTHORITY_LIFE)
    cross, previous = "", ""
    if before is not None:
        previous = "".join([before.certificate, *before.previous])
        signer, signing_key = _read(before.certificate), _read_key(before.key)
        if signer is not None and signing_key is not None and _is_pair(signer, before.key) and _is_valid(signer, now):
            ends = min(signer.not_valid_after_utc, now + AUTHORITY_LIFE)
            begins = max(signer.not_valid_before_utc, now - BACKDATED)
            cross = _pem(
                _authority(name, key.public_key(), signer.subject, signing_key, signing_key.public_key(), begins, ends)
            )
    return Authority(
        certificate=_pem(certificate),
        key=_key_pem(key),
        previous=tuple(_valid([previous, trusted], now))[:MAX_PREVIOUS],
        cross=cross,
    )


def make_leaf(authority: Authority, names: Sequence[str], now: datetime) -> Leaf:
    """
    A new leaf of an authority that `decide` found to be good.

    Raises:
        ValueError: the authority cannot be read.
    """
    signer, signing_key = _read(authority.certificate), _read_key(authority.key)
    if signer is None or signing_key is None:
        raise ValueError("the authority cannot be read")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        # A common name is limited to 64 characters, and nobody reads it any more.
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pillion")]))
        .issuer_name(signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(signer.not_valid_before_utc, now - BACKDATED))
        .not_valid_after(min(signer.not_valid_after_utc, now + LEAF_LIFE))
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()),
            critical=False,
        )
    )
    chain = _pem(builder.sign(signing_key, hashes.SHA256())) + "".join(_valid([authority.cross], now))
    return Leaf(chain=chain, key=_key_pem(key))


def bundle(authority: Authority, now: datetime, *, trusted: str = "") -> str:
    """
    The certificates that are to be trusted now, PEM: the authority's first, each once.

    Args:
        authority: the current signer.
        now: when.
        trusted: what a leaf that is still served is trusted by; PEM.
    """
    certificates = _valid([authority.certificate, *authority.previous, trusted], now)
    return "".join(list(certificates)[: 1 + MAX_PREVIOUS])


def split(text: str) -> list[str]:
    """The certificates of a text, one PEM each; none where it cannot be read."""
    return [_pem(certificate) for certificate in _read_all(text)]


def ends(chain: str) -> datetime | None:
    """When the first certificate of a chain ends; None: it cannot be read."""
    certificate = _read(chain)
    return certificate.not_valid_after_utc if certificate else None


def fingerprint(chain: str) -> str:
    """Names the first certificate of a chain in logs, without saying anything about it. Empty: it cannot be read."""
    certificate = _read(chain)
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()[:16] if certificate else ""


def _authority(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    signing_key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePublicKey,
    begins: datetime,
    ends: datetime,
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        # No bound on the path's length: a cross certificate stands between an old authority and a leaf.
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .sign(signing_key, hashes.SHA256())
    )


def _key_usage(*, digital_signature: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=not digital_signature,
        crl_sign=not digital_signature,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    return [*alternatives.get_values_for_type(x509.DNSName), *(str(address) for address in addresses)]


def _is_pair(certificate: x509.Certificate, key: str) -> bool:
    private_key = _read_key(key)
    return private_key is not None and private_key.public_key() == certificate.public_key()


def _is_signed_by(certificate: x509.Certificate, signer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(signer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _is_valid(certificate: x509.Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc


def _is_old(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether the greater part of its life is over, or has not begun: a clock was wrong then, or is now."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return not begins <= now < begins + (ends - begins) * RENEW_AT


def _valid(texts: Iterable[str], now: datetime) -> Iterable[str]:
    """The certificates in these texts that are valid now, each once, in order."""
    valid: dict[str, None] = {}
    for text in texts:
        for certificate in _read_all(text):
            if _is_valid(certificate, now):
                valid[_pem(certificate)] = None
    return valid


def _read(text: str) -> x509.Certificate | None:
    return next(iter(_read_all(text)), None)


def _read_all(text: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text.encode()) if text.strip() else []
    except ValueError:
        return []


def _read_key(text: str) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = serialization.load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError):
        # No PEM, or one with a password.
        return None
    # We make no other kind; one of another was put there by somebody else.
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
