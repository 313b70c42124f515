"""
Tests of which store a URL and options mean, and what of the environment counts.

Called from: pytest.
"""

import builtins
import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest

from pillion.errors import SettingsError
from pillion.wire.object_store import Checksum, Encryption, ObjectStore
from pillion_sidecar.settings import Settings
from pillion_sidecar.storage import object_client, object_requests
from pillion_sidecar.storage.object_client import Place
from pillion_sidecar.storage.objects import ObjectFolder

LATER = timedelta(seconds=60)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, and nothing else of a cloud's."""
    for name in (
        "AWS_ENDPOINT",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def signed(url: str, options: ObjectStore) -> str:
    """The address that a request for one object goes to. No request is made."""
    place = object_client.parse(url)
    client: Any = object_client.documents(
        Place(place.scheme, place.bucket, ""), object_client.resolved(place, options), ""
    )
    return str(obstore.sign(client, "GET", f"{place.prefix}/file", LATER))


@pytest.mark.parametrize("url", ["s3://bucket/run/1", "gs://bucket/run/1/", "az://bucket/run/1"])
def test_a_url_names_a_bucket_and_a_prefix(url: str) -> None:
    """Scheme, bucket and prefix, and the URL again without a slash at its end."""
    place = object_client.parse(url)
    assert (place.scheme, place.bucket, place.prefix) == (url.partition(":")[0], "bucket", "run/1")
    assert str(place) == url.rstrip("/")
    assert str(object_client.parse("s3://bucket")) == "s3://bucket"


@pytest.mark.parametrize(
    "url",
    [
        "/runs/one",
        "s3:/bucket/x",
        "s3://",
        "s3:///x",
        "http://bucket/x",
        "s3://bucket/a//b",
        "s3://bucket/../x",
        "s3://bucket/a?b=c",
        "s3://key:secret@bucket/x",
        "s3://bucket/a\nb",
    ],
)
def test_what_is_no_such_url_is_refused_by_name(url: str) -> None:
    """The error names the URL and what is allowed."""
    with pytest.raises(SettingsError, match=r"s3://BUCKET/PREFIX|single slashes"):
        object_client.parse(url)


def test_aws_is_asked_by_the_buckets_own_name() -> None:
    """Without an endpoint the bucket is a host of its region, unless a dot in its name would break the certificate."""
    assert signed("s3://bucket/run", ObjectStore(region="eu-central-1")).startswith(
        "https://bucket.s3.eu-central-1.amazonaws.com/run/file?"
    )
    assert signed("s3://my.bucket/run", ObjectStore(region="eu-central-1")).startswith(
        "https://s3.eu-central-1.amazonaws.com/my.bucket/run/file?"
    )


def test_an_endpoint_has_buckets_as_paths() -> None:
    """An endpoint is asked as it is, with the bucket as the first part of the path."""
    assert signed("s3://bucket/run", ObjectStore(endpoint="https://store.example:9000/")).startswith(
        "https://store.example:9000/bucket/run/file?"
    )


def test_the_environments_endpoint_and_region_count_where_no_option_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that every client of AWS knows are read, S3's own one first; an option takes their place."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://any.example")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")
    assert signed("s3://bucket/run", ObjectStore()).startswith("https://any.example/bucket/")
    assert "eu-west-3" in signed("s3://bucket/run", ObjectStore())
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://own.example")
    assert signed("s3://bucket/run", ObjectStore()).startswith("https://own.example/bucket/")
    assert signed("s3://bucket/run", ObjectStore(endpoint="https://said.example")).startswith("https://said.example/")


@pytest.mark.parametrize(
    ("endpoint", "private"),
    [
        ("", True),
        ("https://store.example", True),
        ("http://127.0.0.1:9000", True),
        ("http://[::1]:9000", True),
        ("http://localhost:9000", True),
        ("http://store.example:9000", False),
        ("http://10.0.0.1:9000", False),
        ("http://localhost.example", False),
    ],
)
def test_a_payload_is_signed_where_somebody_can_be_in_between(endpoint: str, private: bool) -> None:
    """TLS protects it, and this machine has nobody in between; plain http to anywhere else has."""
    assert object_client.is_private(endpoint) == private


@pytest.mark.parametrize(
    ("endpoint", "asked", "sent"),
    [
        ("", Checksum.AUTO, "CRC64NVME"),
        ("https://s3.eu-central-1.amazonaws.com", Checksum.AUTO, "CRC64NVME"),
        ("https://s3.amazonaws.com.example", Checksum.AUTO, None),
        ("https://store.example", Checksum.AUTO, None),
        ("https://store.example", Checksum.SHA256, "SHA256"),
        ("", Checksum.NONE, None),
    ],
)
def test_a_checksum_goes_where_it_is_understood(endpoint: str, asked: Checksum, sent: str | None) -> None:
    """AWS gets one by default; others only when a policy says so."""
    assert object_client.checksum_of(ObjectStore(endpoint=endpoint, checksum=asked)) == sent


def test_an_endpoint_of_the_environment_that_is_no_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy's is checked when it is read; the environment's when it is used."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "store.example:9000")
    with pytest.raises(SettingsError, match=r"endpoint store.example:9000"):
        ObjectFolder.open("s3://bucket/run")


def test_what_only_s3_has_is_refused_elsewhere() -> None:
    """A key, requester pays and a checksum are not silently left out."""
    for options in (
        ObjectStore(encryption=Encryption(kms_key_id="key")),
        ObjectStore(requester_pays=True),
        ObjectStore(checksum=Checksum.SHA256),
    ):
        with pytest.raises(SettingsError, match=r"gs://bucket/run.* needs s3://"):
            ObjectFolder.open("gs://bucket/run", options)


def test_a_ca_file_that_is_none_is_named(tmp_path: Path) -> None:
    """A file that is not there, and one without a certificate, are errors that say so when the root is opened."""
    with pytest.raises(SettingsError, match=str(tmp_path / "none")):
        ObjectFolder.open("s3://bucket/run", ca_file=str(tmp_path / "none"))
    (tmp_path / "empty.pem").write_text("no certificate")
    with pytest.raises(SettingsError, match="certificate"):
        ObjectFolder.open("s3://bucket/run", ca_file=str(tmp_path / "empty.pem"))


def test_a_missing_obstore_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is not installed the error says which one is needed, and for which URL."""
    original = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "obstore":
            raise ImportError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r"s3://bucket.* obstore is needed"):
        ObjectFolder.open("s3://bucket/run")


def test_no_call_lasts_longer_than_storage_may_stand_still() -> None:
    """A request with its last repetition, and a call with its last request, end before the executor would be replaced."""
    bound_s = next(each.default for each in dataclasses.fields(Settings) if each.name == "storage_timeout_s")
    assert isinstance(bound_s, float)
    document_s = object_client.DOCUMENT_RETRIES_S + object_client.DOCUMENT_TIMEOUT_S
    bulk_s = object_client.BULK_RETRIES_S + object_client.BULK_TIMEOUT_S
    assert object_requests.CALL_S + document_s < bound_s
    assert bulk_s < bound_s
    assert max(object_client.DOCUMENT_RETRIES_S, object_client.BULK_RETRIES_S) <= 120
