"""
Opens the folder that a path or URL names. Called from: the supervisor, the executor, `reporting.reporter`.
"""

from __future__ import annotations

import dataclasses
from typing import final

from pillion.wire.object_store import ObjectStore
from pillion_sidecar.storage import object_client
from pillion_sidecar.storage.folder import Folder
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.storage.objects import ObjectFolder


@final
class Opener:
    """
    Opens the folders of one process. All folders of a bucket share their clients, and with them connections, and the bandwidth limit.

    Args:
        options: options for the access to buckets; None: the defaults. Directories have none.
        ca_file: path of a PEM file with authorities that are trusted besides the system's.
    """

    def __init__(self, options: ObjectStore | None = None, ca_file: str = "") -> None:
        self._options = options
        self._ca_file = ca_file
        self._buckets: dict[str, ObjectFolder] = {}

    def open(self, path_or_url: str) -> Folder:
        """Return the folder, as `open_folder`. Raises: SettingsError."""
        if "://" not in path_or_url:
            return LocalFolder(path_or_url)
        place = object_client.parse(path_or_url)
        url = str(dataclasses.replace(place, prefix=""))
        if url not in self._buckets:
            self._buckets[url] = ObjectFolder.open(url, self._options, ca_file=self._ca_file)
        bucket = self._buckets[url]
        return bucket.below(place.prefix) if place.prefix else bucket


def open_folder(path_or_url: str, options: ObjectStore | None = None, *, ca_file: str = "") -> Folder:
    """
    Return the folder. It need not exist. No I/O.

    Args:
        path_or_url: path of a directory, or URL of a prefix in a bucket.
        options: options for the access to a bucket; None: the defaults. A directory has none.
        ca_file: path of a PEM file with authorities that are trusted besides the system's.

    Raises:
            SettingsError: this release does not know the kind of URL, or this kind of store does not have an option.
    """
    return Opener(options, ca_file).open(path_or_url)
