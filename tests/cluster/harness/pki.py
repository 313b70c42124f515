"""
The whole of: the certificates and kubeconfigs of a built cluster.

Called from: `built`. Everything is made anew for each cluster, and lives as long.
Must never: be used for anything but a test cluster; the keys lie in files that root can read.
"""

import base64
import datetime
import ipaddress
import json
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFE = datetime.timedelta(days=30)


class Authority:
    """The cluster's certificate authority, and the folder that its certificates go to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = _name("pillion-test", ())
        self._certificate = (
            _builder(name, name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = folder / "ca.crt"
        self.path.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))
        # For the controller manager, which signs certificate requests.
        self.key_path = _write_key(folder / "ca.key", self._key)

    def issue(self, name: str, user: str, *, groups: Sequence[str] = (), sans: Sequence[str] = ()) -> tuple[Path, Path]:
        """A certificate for a server (with `sans`) or a user; certificate and key, as files."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(user, groups), self._certificate.subject, key.public_key()).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName([_san(each) for each in sans]), critical=False)
        path = self.folder / f"{name}.crt"
        certificate = builder.sign(self._key, hashes.SHA256())
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path, _write_key(self.folder / f"{name}.key", key)

    def kubeconfig(self, name: str, user: str, *, server: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig for a user, with everything in it."""
        certificate, key = self.issue(name, user, groups=groups)
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "pillion-test",
            "clusters": [
                {
                    "name": "pillion-test",
                    "cluster": {"server": server, "certificate-authority-data": _base64(self.path)},
                }
            ],
            "users": [
                {
                    "name": user,
                    "user": {"client-certificate-data": _base64(certificate), "client-key-data": _base64(key)},
                }
            ],
            "contexts": [{"name": "pillion-test", "context": {"cluster": "pillion-test", "user": user}}],
        }
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(document))
        path.chmod(0o600)
        return path


def service_account_keys(folder: Path) -> tuple[Path, Path]:
    """The key pair that service account tokens are signed with: public, private."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = folder / "service-account.pub"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return public, _write_key(folder / "service-account.key", key)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + LIFE)
    )


def _name(user: str, groups: Sequence[str]) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
    attributes += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name(attributes)


def _san(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> Path:
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    return path


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
