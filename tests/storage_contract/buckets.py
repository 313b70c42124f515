"""
A test's bucket as a folder of the product, with the credentials in the environment as a pod has them.

Called from: the contract of storage, and the tests of faults.
Must never: hand a credential to the product by another way.
"""

from typing import Any

import pytest

from pillion.wire.object_store import ObjectStore
from pillion_sidecar.storage.objects import ObjectFolder
from support.object_stores.places import Place


def open_bucket(place: Place, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ObjectFolder:
    """
    The bucket.

    Args:
        options: fields of ObjectStore.
    """
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    return ObjectFolder.open(place.url, ObjectStore(endpoint=place.endpoint, **options))
