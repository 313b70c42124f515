"""
The whole of: creating and renewing the certificate and the trust in it, in mode `Self`.

Called from: the controller that holds the Lease. It checks what exists and creates what is missing: at an interval,
and at once when somebody changes a Secret or the webhook configuration.
Must never: write a leaf before the API server trusts its authority; touch anything but the two Secrets and the caBundle of the one
webhook configuration.

    Secret pillion-authority       ca.crt (its own first, then those before it), ca.key, cross.crt     written first
    MutatingWebhookConfiguration   caBundle of each of its webhooks                                    then this
    Secret pillion-tls             tls.crt, tls.key, ca.crt                                            last, so that it is trusted
"""

import asyncio
import base64
import contextlib
import logging
import random
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Final

from pillion_operator import metrics
from pillion_operator.certificates import issue, serving
from pillion_operator.cluster import client, paths, reflector
from pillion_operator.cluster.client import Json
from pillion_operator.log import Field
from pillion_operator.settings import Settings

CHECK_S: Final = 600.0
"""
Interval between two checks when nothing changes. A certificate that is due has a month left, and a check also repairs a missed
watch event.
"""
PAUSE_S: Final = 1.0
"""Minimum pause between two checks. If somebody keeps undoing the writes, this bounds them to one a second."""
RETRY_S: Final = 5.0
"""Pause after a check that failed."""
PROPAGATION_S: Final = 5.0
"""
Time between writing a caBundle with a new authority and serving its first leaf. Every API server must have read the bundle; each
watches it, so a second is long.
"""
_AUTHORITY_KEY: Final = "ca.key"
_CROSS: Final = "cross.crt"
_TLS: Final = "kubernetes.io/tls"
_OPAQUE: Final = "Opaque"

_log = logging.getLogger(__name__)


class Rotation:
    """The loop of the leader that keeps authority, trust and certificate as they have to be."""

    def __init__(self, api: client.Client, settings: Settings, *, propagation_s: float = PROPAGATION_S) -> None:
        self._client = api
        self._settings = settings
        self._propagation_s = propagation_s
        self._configuration = configuration_path(settings)
        self._due = asyncio.Event()
        self._watches = [
            reflector.Reflector(
                api,
                path,
                _version,
                field_selector=f"metadata.name={name}",
                metadata_only=True,
                on_change=lambda *_: self._due.set(),
            )
            for path, name in (
                (paths.SECRETS.within(settings.namespace), settings.secret_name),
                (paths.SECRETS.within(settings.namespace), settings.authority_secret_name),
                (paths.WEBHOOK_CONFIGURATIONS.everywhere, settings.webhook_configuration),
            )
        ]

    async def run(self) -> None:
        """Keep everything as it has to be. Blocks: until it is cancelled."""
        async with self._watching():
            while True:
                self._due.clear()
                wait_s = CHECK_S
                try:
                    await self.once()
                except client.Conflict:
                    # Somebody wrote meanwhile; the next look shows what.
                    wait_s = 0.0
                except (client.ApiError, client.Unreachable) as err:
                    _log.warning("checking the certificates failed; trying again: %s", err)
                    wait_s = RETRY_S
                await asyncio.sleep(PAUSE_S * random.uniform(1.0, 1.5))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._due.wait(), wait_s)

    @contextlib.asynccontextmanager
    async def _watching(self) -> AsyncGenerator[None]:
        tasks = [asyncio.create_task(each.run(), name="certificate watch") for each in self._watches]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def once(self) -> None:
        """
        Look, and make what is missing.

        Raises:
            ApiError, Unreachable: it is not done; the next look goes on where this one ended.
        """
        now = datetime.now(UTC)
        names = self._settings.server_names()
        authority_secret = await self._read(self._secret(self._settings.authority_secret_name))
        leaf_secret = await self._read(self._secret(self._settings.secret_name))
        configuration = await self._read(self._configuration)
        authority, leaf = read_authority(authority_secret), read_leaf(leaf_secret)
        trusted = serving.text(leaf_secret or {}, serving.AUTHORITY)

        due = issue.decide(authority, leaf, names, now)
        if due is issue.Due.RENEW_AUTHORITY or authority is None:
            # Also where both Secrets were deleted: the certificate that is served from memory stays trusted.
            trusted += trusted_now(configuration or {})
            authority = issue.make_authority(now, before=authority, trusted=trusted)
            await self._write(
                self._settings.authority_secret_name, authority_secret, _OPAQUE, authority_data(authority)
            )
            self._made("authority", authority.certificate)
            due = issue.Due.RENEW_LEAF

        bundle = issue.bundle(authority, now, trusted=trusted)
        is_new = await self._trust(configuration, bundle)
        if due is issue.Due.KEEP and trusted == bundle and leaf is not None:
            return
        if due is not issue.Due.KEEP or leaf is None:
            # Where nothing was trusted, nothing is served that could be followed by what is refused. For how long the bundle
            # was as it is, is not known after a crash between the two, so that a leaf's first authority is waited for too.
            is_first_leaf = leaf is not None and authority.certificate not in trusted
            if is_first_leaf or (is_new and trusted_now(configuration or {})):
                await asyncio.sleep(self._propagation_s)
            leaf = issue.make_leaf(authority, names, now)
            self._made("leaf", leaf.chain)
        data = {serving.CERTIFICATE: leaf.chain, serving.KEY: leaf.key, serving.AUTHORITY: bundle}
        await self._write(self._settings.secret_name, leaf_secret, _TLS, data)

    async def _trust(self, configuration: Json | None, bundle: str) -> bool:
        """Have the API server trust these; whether it did not before."""
        if configuration is None:
            # The chart may be about to create it; the watch then reports it.
            _log.warning("MutatingWebhookConfiguration %s does not exist", self._settings.webhook_configuration)
            return False
        operations = trust(configuration, bundle)
        if not operations:
            return False
        await self._client.patch(self._configuration, operations, kind=client.PatchKind.JSON)
        self._made("bundle", bundle)
        return True

    def _secret(self, name: str) -> str:
        return paths.SECRETS.one(self._settings.namespace, name)

    async def _read(self, path: str) -> Json | None:
        try:
            return await self._client.get(path)
        except client.NotFound:
            return None

    async def _write(self, name: str, secret: Json | None, kind: str, data: dict[str, str]) -> None:
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
        if secret is not None:
            # It contains the version that was read, so a concurrent write is not overwritten.
            await self._client.replace(self._secret(name), secret | {"data": encoded})
            return
        metadata = {"name": name, "labels": {"app.kubernetes.io/managed-by": "pillion-operator"}}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind, "data": encoded}
        await self._client.create(paths.SECRETS.within(self._settings.namespace), body)

    def _made(self, what: str, chain: str) -> None:
        metrics.CERTIFICATE_ROTATIONS.labels(what).inc()
        ends = str(issue.ends(chain))
        _log.info("created a new %s certificate: %s", what, issue.fingerprint(chain), extra={Field.EXPIRES: ends})


def trust(configuration: Json, bundle: str) -> list[Json]:
    """
    The JSON Patch that puts `bundle` into each webhook of a configuration; empty: it is there.

    Each operation is guarded by the webhook's name, and all by the version that was read: a chart that is being upgraded may
    have put another webhook in its place.
    """
    encoded = base64.b64encode(bundle.encode()).decode()
    operations: list[Json] = []
    for index, webhook in enumerate(configuration.get("webhooks") or []):
        if (webhook.get("clientConfig") or {}).get("caBundle") != encoded:
            path = f"/webhooks/{index}"
            operations += [
                {"op": "test", "path": f"{path}/name", "value": webhook.get("name")},
                {"op": "add", "path": f"{path}/clientConfig/caBundle", "value": encoded},
            ]
    version = (configuration.get("metadata") or {}).get("resourceVersion")
    guard = {"op": "replace", "path": "/metadata/resourceVersion", "value": version}
    return [guard, *operations] if operations else []


def configuration_path(settings: Settings) -> str:
    """Path of the operator's own webhook configuration in the API."""
    return paths.WEBHOOK_CONFIGURATIONS.one("", settings.webhook_configuration)


def trusted_now(configuration: Json) -> str:
    """The certificates that a configuration trusts, PEM."""
    bundles = [(webhook.get("clientConfig") or {}).get("caBundle") for webhook in configuration.get("webhooks") or []]
    return "".join(serving.text({"data": {"": bundle}}, "") for bundle in dict.fromkeys(bundles) if bundle)


def read_authority(secret: Json | None) -> issue.Authority | None:
    """The authority in its Secret; None if there is none. `issue.decide` decides whether it can be used."""
    if secret is None:
        return None
    own, *previous = issue.split(serving.text(secret, serving.AUTHORITY)) or [""]
    key, cross = serving.text(secret, _AUTHORITY_KEY), serving.text(secret, _CROSS)
    return issue.Authority(certificate=own, key=key, previous=tuple(previous), cross=cross)


def authority_data(authority: issue.Authority) -> dict[str, str]:
    """The data of its Secret."""
    data = {
        serving.AUTHORITY: "".join([authority.certificate, *authority.previous]),
        _AUTHORITY_KEY: authority.key,
    }
    return data | ({_CROSS: authority.cross} if authority.cross else {})


def read_leaf(secret: Json | None) -> issue.Leaf | None:
    """The leaf in its Secret; None: there is none."""
    if secret is None:
        return None
    material = serving.material(secret)
    return issue.Leaf(chain=material.chain, key=material.key)


def _version(document: Json) -> str:
    return str((document.get("metadata") or {}).get("resourceVersion") or "")
