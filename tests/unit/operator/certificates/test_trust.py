"""
The whole of: how the authority gets into the webhook configuration, and what the Secrets hold.

Called from: pytest.
"""

import base64
import datetime
from datetime import UTC
from typing import Any

from pillion_operator.certificates import issue, rotation, serving
from support import json_patch

NOW = datetime.datetime(2026, 11, 24, tzinfo=UTC)
AUTHORITY = issue.make_authority(NOW)
BUNDLE = issue.bundle(AUTHORITY, NOW)
ENCODED = base64.b64encode(BUNDLE.encode()).decode()


def configuration(*bundles: str | None) -> dict[str, Any]:
    """A webhook configuration with one webhook for each bundle; None stands for none."""
    return {
        "metadata": {"name": "pillion", "resourceVersion": "7"},
        "webhooks": [
            {"name": f"{index}.pillion.dev", "clientConfig": {"service": {}} | ({"caBundle": each} if each else {})}
            for index, each in enumerate(bundles)
        ],
    }


def secret(data: dict[str, str]) -> dict[str, Any]:
    return {"data": {name: base64.b64encode(value.encode()).decode() for name, value in data.items()}}


def test_the_bundle_is_put_where_it_is_missing_or_another() -> None:
    """A chart that renders the configuration anew, without a caBundle, gets it back; nothing else is touched."""
    before = configuration(None, ENCODED, "b3RoZXI=")
    after = json_patch.apply(before, rotation.trust(before, BUNDLE))
    assert after == configuration(ENCODED, ENCODED, ENCODED)


def test_nothing_is_written_where_it_is_there() -> None:
    """A configuration that trusts us already is left alone."""
    assert rotation.trust(configuration(ENCODED), BUNDLE) == []
    assert rotation.trust({"metadata": {}}, BUNDLE) == []


def test_a_patch_is_for_the_version_that_was_read() -> None:
    """Another version, or another webhook in its place, makes the API server refuse the patch."""
    guard, is_named, _ = rotation.trust(configuration(None), BUNDLE)
    assert guard == {"op": "replace", "path": "/metadata/resourceVersion", "value": "7"}
    assert is_named == {"op": "test", "path": "/webhooks/0/name", "value": "0.pillion.dev"}


def test_what_a_configuration_trusts_is_read_back() -> None:
    """Each bundle once; what is no text counts as nothing."""
    assert rotation.trusted_now(configuration(ENCODED, ENCODED, None)) == BUNDLE
    assert rotation.trusted_now(configuration("////")) == ""


def test_an_authority_comes_back_from_its_secret() -> None:
    """What is written is what is read, with its predecessors and the chain between them."""
    second = issue.make_authority(NOW, before=AUTHORITY)
    for each in (AUTHORITY, second):
        assert rotation.read_authority(secret(rotation.authority_data(each))) == each
    assert rotation.read_authority(None) is None


def test_a_broken_secret_is_read_as_an_empty_one() -> None:
    """No content of a Secret raises."""
    for data in ({}, {"tls.crt": "?"}, {"tls.crt": "////", "ca.crt": ""}):
        assert serving.material({"data": data}) == serving.Material(chain="", key="", authority="")
    assert rotation.read_authority({}) == issue.Authority(certificate="", key="")
    assert rotation.read_leaf({"data": None}) == issue.Leaf(chain="", key="")
