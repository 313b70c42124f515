"""
The whole of: the TLS context of a server, which takes a new certificate from the Secret while it serves.

Called from: webhook and controller. Each handshake gets the newest certificate; no listener is closed for it, and connections
that are open stay as they are.
Must never: replace a good certificate by one that cannot be used.
"""

import base64
import binascii
import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pillion_operator import metrics
from pillion_operator.certificates import issue
from pillion_operator.cluster import client, paths, reflector
from pillion_operator.cluster.client import Json
from pillion_operator.log import Field

_log = logging.getLogger(__name__)

CERTIFICATE: Final = "tls.crt"
KEY: Final = "tls.key"
AUTHORITY: Final = "ca.crt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The content of a Secret of the type ``kubernetes.io/tls``, PEM. A field that is missing or not text is empty."""

    chain: str
    key: str
    authority: str


def material(secret: Json) -> Material:
    """Read the content of a Secret."""
    return Material(chain=text(secret, CERTIFICATE), key=text(secret, KEY), authority=text(secret, AUTHORITY))


def text(secret: Json, name: str) -> str:
    """One value of a Secret; empty where it is missing, or no text."""
    try:
        return base64.b64decode(str((secret.get("data") or {}).get(name) or "")).decode("ascii")
    except (binascii.Error, UnicodeDecodeError):
        return ""


class Serving:
    """
    A TLS context for servers, and the task that keeps it new.

    The context can be served from the start; until there is a certificate, every handshake is refused.
    """

    def __init__(
        self,
        api: client.Client,
        namespace: str,
        secret: str,
        *,
        client_authority: str = "",
        on_change: Callable[[Material], None] | None = None,
    ) -> None:
        """
        Args:
            api: access to the API server.
            namespace: of the Secret.
            secret: its name.
            client_authority: certificates, PEM, that a client's has to be signed by. Empty: a client needs none.
            on_change: called in the loop with what is served from now on.

        Raises:
            ssl.SSLError: `client_authority` holds no certificate.
        """
        self._client_authority = client_authority
        self.context: Final = self._empty_context()
        # Called for each handshake, with a server name or without one. Another context has no key of an earlier certificate,
        # as it would after load_cert_chain in place, where a key of another kind is kept beside the new one.
        self.context.sni_callback = self._choose
        self.material: Material | None = None
        """The served certificate; None before there is one."""
        self._newest: ssl.SSLContext | None = None
        self._name = secret
        self._on_change = on_change
        self._reflector = reflector.Reflector(
            api,
            paths.SECRETS.within(namespace),
            material,
            field_selector=f"metadata.name={secret}",
            on_change=self._changed,
        )

    @property
    def ready(self) -> bool:
        """Whether there is a certificate to serve."""
        return self._newest is not None

    async def run(self) -> None:
        """Follow the Secret. Blocks: until it is cancelled."""
        await self._reflector.run()

    def take(self, fresh_material: Material) -> bool:
        """Serve this from now on; False, with the reason in the log, where it cannot be served."""
        fresh = self._empty_context()
        try:
            load(fresh, fresh_material)
        except (ssl.SSLError, OSError) as err:
            metrics.CERTIFICATE_LOADS.labels("refused").inc()
            _log.error("cannot serve the certificate in Secret %s: %s", self._name, err)
            return False
        self._newest, self.material = fresh, fresh_material
        ends = issue.ends(fresh_material.chain)
        metrics.CERTIFICATE_LOADS.labels("loaded").inc()
        metrics.CERTIFICATE_EXPIRY.set(ends.timestamp() if ends else 0)
        _log.info(
            "serving certificate %s",
            issue.fingerprint(fresh_material.chain),
            extra={Field.EXPIRES: ends and ends.isoformat()},
        )
        if self._on_change is not None:
            self._on_change(fresh_material)
        return True

    def _empty_context(self) -> ssl.SSLContext:
        """A context without a certificate. Each context requires the client's certificate, as a connection is checked by its own context."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        # Neither the API server nor a sidecar resumes a session: both keep their connections, and Go's client keeps no tickets.
        made.num_tickets = 0
        if self._client_authority:
            made.load_verify_locations(cadata=self._client_authority)
            made.verify_mode = ssl.CERT_REQUIRED
        return made

    def _changed(self, _: reflector.Key, old: Material | None, new: Material | None) -> None:
        if new is None:
            _log.warning("Secret %s was deleted; still serving its last certificate", self._name)
        elif new != self.material:
            self.take(new)

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
        if self._newest is None:
            return ssl.AlertDescription.ALERT_DESCRIPTION_INTERNAL_ERROR
        connection.context = self._newest
        return None


def load(context: ssl.SSLContext, material: Material) -> None:
    """
    Have a context show a certificate.

    OpenSSL reads certificates from files only; these are in memory, and gone with their descriptors.

    Raises:
        ssl.SSLError: they are no certificate and its key.
    """
    chain, key = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("chain", "key"))
    try:
        for descriptor, content in ((chain, material.chain), (key, material.key)):
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(content.encode())
        # A key with a password must not make OpenSSL prompt on a terminal.
        context.load_cert_chain(f"/proc/self/fd/{chain}", f"/proc/self/fd/{key}", password=lambda: "")
    finally:
        os.close(chain)
        os.close(key)
