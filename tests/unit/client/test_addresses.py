"""
Whether a root is understood as the user means it: a directory, a bucket, or neither.

Called from: pytest.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pillion import addresses
from pillion.errors import SettingsError


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("s3://bucket/run-1", "s3://bucket/run-1"),
        ("gs://bucket/run-1/", "gs://bucket/run-1"),
        ("az://container", "az://container"),
        ("/data/run-1/", "/data/run-1"),
        (Path("/data/run-1"), "/data/run-1"),
        ("run-1", os.path.abspath("run-1")),
        ("file:///data/run-1", "/data/run-1"),
        ("", ""),
    ],
)
def test_a_bucket_stays_a_url_and_a_directory_becomes_absolute(given: str | os.PathLike[str], address: str) -> None:
    """A trainer may change its working directory, and the sidecar has another one."""
    assert addresses.absolute(given) == address
    addresses.check(address)


@pytest.mark.parametrize("given", [Path("s3://bucket/run-1"), "s3:/bucket/run-1"])
def test_a_url_that_went_through_a_path_is_no_directory_of_that_name(given: str | os.PathLike[str]) -> None:
    """A `Path` makes one slash of two: a directory `s3:` would be made, and the bucket stay empty."""
    with pytest.raises(SettingsError, match=r"pathlib\.Path cannot hold a URL.*'s3://bucket/run-1'"):
        addresses.check(addresses.absolute(given))


@pytest.mark.parametrize("given", ["http://host/run-1", "gcs://bucket/run-1", "memory://run", "S3://bucket/run"])
def test_another_scheme_is_refused_with_the_ones_that_there_are(given: str) -> None:
    """A directory of such a name would be made otherwise."""
    with pytest.raises(SettingsError, match=r"s3://, gs://, az://"):
        addresses.check(addresses.absolute(given))
