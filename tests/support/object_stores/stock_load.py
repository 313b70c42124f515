"""
A program that loads a checkpoint from S3 as somebody without Pillion does: with torch and one of the readers that it has for S3.

Called from: tests, by way of `StockReader`; each load is a process of its own, as these readers keep threads for its life.
Must never: import anything of Pillion.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    from support.object_stores.places import Place
    from support.processes import Processes, Run

READERS: Final = ("fsspec", "connector", "s3fs")
"""torch's own FsspecReader, found by the URL's scheme, over obstore; the reader of s3torchconnector; FsspecReader over s3fs, which is what fsspec
takes for s3:// when nobody says otherwise."""


@final
@dataclass(frozen=True, slots=True)
class StockReader:
    """One of READERS, whose packages are there."""

    name: str
    packages: Path | None
    """Folder of packages that go before those of the environment; None: there are none."""

    def start(self, processes: Processes, place: Place, folder: str, out: Path) -> Run:
        """
        Begin a load of a folder of a bucket of S3; the state is in `out` when the program has ended.
        """
        environment = {"AWS_ENDPOINT_URL": place.endpoint, "AWS_ALLOW_HTTP": "true", **place.environment}
        if self.packages is not None:
            rest = os.environ.get("PYTHONPATH", "")
            environment["PYTHONPATH"] = f"{self.packages}{os.pathsep}{rest}" if rest else str(self.packages)
        return processes.python(
            Path(__file__), self.name, f"{place.url}/{folder}", place.endpoint, out, env=environment
        )


def load(reader: str, url: str, endpoint: str, out: Path) -> None:
    """
    Load everything that a checkpoint has, and write the state to a file for torch.load.

    Args:
        reader: one of READERS.
        url: s3://bucket/folder.
        endpoint: of the store.
        out: the file.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    storage = _connector(url, endpoint) if reader == "connector" else _fsspec(url, registered=reader == "fsspec")
    metadata = storage.read_metadata()
    state: dict[str, Any] = {
        name: torch.empty(each.size, dtype=each.properties.dtype) if isinstance(each, TensorStorageMetadata) else None
        for name, each in metadata.state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=storage)
    torch.save(state, out)


def _fsspec(url: str, *, registered: bool) -> Any:
    from obstore.fsspec import register
    from torch.distributed.checkpoint._storage_utils import _storage_setup

    # The endpoint and the credentials are in the environment, where obstore and s3fs look for them.
    if registered:
        register("s3")
    return _storage_setup(None, url, reader=True)


def _connector(url: str, endpoint: str) -> Any:
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client
    from s3torchconnector.dcp import S3StorageReader

    reader = S3StorageReader("us-east-1", url)
    # There is no public way to another endpoint than the region's.
    reader.fs._client = S3Client("us-east-1", endpoint=endpoint, s3client_config=S3ClientConfig(force_path_style=True))
    return reader


if __name__ == "__main__":
    load(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
