"""
The clients of obstore, made from a URL and options: which store is meant, and the timeouts of its requests.

    s3://bucket/prefix    gs://bucket/prefix    az://container/prefix

Credentials come only from the environment, as obstore reads it: AWS_*, GOOGLE_*, AZURE_*, a web identity, or the machine's own. All other
settings are passed explicitly, so that the environment cannot change a policy.

Bytes on the wire: over https the payload of an upload is not signed, because TLS protects it and a SHA-256 costs a CPU second per GiB. AWS also
gets a CRC64NVME, which it checks. Other stores with the API of S3 may refuse such a header or even store it, so they get one only if the
options ask for it. Over plain http everything is signed, except to this machine itself, where no other machine can change the bytes. Only S3
signs payloads.

obstore is imported with the first client, so that saves to a directory do not need it.

Called from: `storage.object_requests`, `storage.objects`, `storage.opening`.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import os
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from pillion.errors import SettingsError
from pillion.wire import object_store
from pillion.wire.object_store import Checksum, ObjectStore

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

SCHEMES: Final = ("s3", "gs", "az")

CONNECT_TIMEOUT_S: Final = 5.0
"""Timeout for the connection to a store."""
DOCUMENT_TIMEOUT_S: Final = 15.0
"""Timeout for one whole request of a document: some MiB at most, or a page of a listing."""
DOCUMENT_RETRIES_S: Final = 30.0
"""Time after which a request of a document is not repeated any more. The last repetition may begin just before: 45 s in all."""
BULK_TIMEOUT_S: Final = 120.0
"""Timeout for one whole request of bulk bytes: 128 MiB at 1.1 MB/s. It includes the upload, so that a slow upload must fit."""
BULK_RETRIES_S: Final = 120.0
"""Time after which a request of bulk bytes is not repeated any more. With the last repetition that is 240 s, below PILLION_STORAGE_TIMEOUT_S, so
that the store's own error is reported before the executor is replaced. A repeated request is not signed again, and a signature lasts 5 min."""
MAX_RETRIES: Final = 20
"""Maximum of repetitions of a request. The bounds above end them first, unless the store refuses connections at once."""
BACKOFF_FIRST_S: Final = 0.2
"""Pause before the first repetition. Each further pause is random, between this one and twice the one before (obstore's jitter)."""
MAX_BACKOFF_S: Final = 10.0
"""Maximum of the pause between two repetitions."""

MAX_OBJECT_BYTES: Final = 1 << 30
"""Maximum size of an object that one request writes. A larger object is written in parts."""


@final
@dataclass(frozen=True, slots=True)
class Place:
    """A prefix of a bucket, as a URL names it."""

    scheme: str
    bucket: str
    prefix: str
    """Prefix without a slash at either end; empty: the bucket itself."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}" if self.prefix else f"{self.scheme}://{self.bucket}"


def parse(url: str) -> Place:
    """
    Return the place that a URL names. Pure.

    Raises:
            SettingsError: the URL is wrong. Names the URL and the allowed forms.
    """
    scheme, separator, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.rstrip("/")
    parts = prefix.split("/") if prefix else []
    if not separator or scheme not in SCHEMES or not bucket:
        raise SettingsError([f"{url}: a bucket is named by {', '.join(f'{each}://BUCKET/PREFIX' for each in SCHEMES)}"])
    if any(part in ("", ".", "..") for part in parts) or not url.isprintable() or {"?", "#", "@"} & set(rest):
        raise SettingsError([f"{url}: a prefix is names with single slashes between them, without '?', '#' and '@'"])
    return Place(scheme, bucket, prefix)


def resolved(place: Place, options: ObjectStore) -> ObjectStore:
    """
    Return the options, completed for S3 from the environment: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION, which every
    client of AWS reads. No I/O.

    Raises:
        SettingsError: lists every option that this kind of store does not have, and an endpoint of the environment that is not a URL.
    """
    problems = [
        f"{place}: objectStore.{broken.name} is {broken.value!r}; allowed: {broken.allowed}"
        for broken in object_store.misfits(options, str(place))
    ]
    endpoint, region = options.endpoint or "", options.region or ""
    if place.scheme == "s3":
        endpoint = endpoint or _first_set("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        region = region or _first_set("AWS_REGION", "AWS_DEFAULT_REGION")
    if endpoint and (urllib.parse.urlsplit(endpoint).scheme not in ("http", "https") or not _host(endpoint)):
        problems.append(f"endpoint {endpoint}: http://HOST[:PORT] or https://HOST[:PORT] is needed")
    if problems:
        raise SettingsError(problems)
    return dataclasses.replace(options, endpoint=endpoint.rstrip("/") or None, region=region or None)


def documents(place: Place, options: ObjectStore, ca_file: str) -> Client:
    """
    Return a client for small requests.

    Args:
            options: the options that `resolved` returned.
            ca_file: path of a PEM file with authorities that are trusted besides the system's; empty: none.

    Raises: SettingsError.
    """
    return _client(place, options, ca_file, DOCUMENT_TIMEOUT_S, DOCUMENT_RETRIES_S)


def bulk(place: Place, options: ObjectStore, ca_file: str) -> Client:
    """
    Return a client for bulk bytes. Raises: SettingsError.

    It is separate from the client of `documents`, because obstore sets timeouts per client. A timeout for reads alone would include uploads too.
    """
    return _client(place, options, ca_file, BULK_TIMEOUT_S, BULK_RETRIES_S)


def _client(place: Place, options: ObjectStore, ca_file: str, timeout_s: float, retries_s: float) -> Client:
    try:
        from obstore import exceptions, store
    except ImportError as err:
        raise SettingsError(
            [f"{place}: the package obstore is needed for a bucket, and is not installed ({err})"]
        ) from err
    client: dict[str, Any] = {
        "timeout": datetime.timedelta(seconds=timeout_s),
        "connect_timeout": datetime.timedelta(seconds=CONNECT_TIMEOUT_S),
        "allow_http": (options.endpoint or "").startswith("http://"),
        "user_agent": "pillion",
    }
    if ca_file:
        client["root_certificate"] = _authorities(ca_file)
    retry: Any = {
        "max_retries": MAX_RETRIES,
        "retry_timeout": datetime.timedelta(seconds=retries_s),
        "backoff": {
            "init_backoff": datetime.timedelta(seconds=BACKOFF_FIRST_S),
            "max_backoff": datetime.timedelta(seconds=MAX_BACKOFF_S),
            "base": 2,
        },
    }
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "s3": (store.S3Store, _s3(place, options)),
        "gs": (store.GCSStore, {"base_url": options.endpoint} if options.endpoint else {}),
        "az": (store.AzureStore, {"endpoint": options.endpoint} if options.endpoint else {}),
    }
    make, config = kinds[place.scheme]
    try:
        made: Client = make(place.bucket, config=config, client_options=client, retry_config=retry)
    except (exceptions.BaseError, ValueError) as err:
        account = "; set AZURE_STORAGE_ACCOUNT_NAME" if "Account must be specified" in str(err) else ""
        raise SettingsError([f"{place}: {str(err).splitlines()[0]}{account}"]) from err
    return made


def _s3(place: Place, options: ObjectStore) -> dict[str, Any]:
    config: dict[str, Any] = {
        "conditional_put": "etag",
        "request_payer": options.requester_pays,
        "unsigned_payload": is_private(options.endpoint or ""),
        # No certificate matches the host name of a bucket with a dot in its name.
        "virtual_hosted_style_request": not options.endpoint and "." not in place.bucket,
    }
    if options.endpoint:
        # Set both names: the variable AWS_ENDPOINT_URL_S3 would override the first one.
        config |= {"endpoint": options.endpoint, "aws_endpoint_url_s3": options.endpoint}
    if options.region:
        config["region"] = options.region
    if options.encryption:
        config |= {"server_side_encryption": "aws:kms", "sse_kms_key_id": options.encryption.kms_key_id}
    if checksum := checksum_of(options):
        config["checksum_algorithm"] = checksum
    return config


def is_private(endpoint: str) -> bool:
    """Whether no other machine can change bytes on the way to an endpoint: it uses https, or is this machine itself. Pure."""
    if not endpoint or endpoint.startswith("https://"):
        return True
    host = _host(endpoint)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checksum_of(options: ObjectStore) -> str | None:
    """Return obstore's name of the checksum that uploads to S3 have; None: they have none. Pure."""
    if options.checksum is not Checksum.AUTO:
        return None if options.checksum is Checksum.NONE else options.checksum.value
    host = _host(options.endpoint or "")
    is_aws = not options.endpoint or host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    return Checksum.CRC64NVME.value if is_aws else None


def _host(endpoint: str) -> str:
    return urllib.parse.urlsplit(endpoint).hostname or ""


def _first_set(*variables: str) -> str:
    return next((value for variable in variables if (value := os.environ.get(variable, ""))), "")


def _authorities(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as err:
        raise SettingsError([f"CA file {path}: {err}; a PEM file is needed"]) from err
