"""
The whole of: a bucket of S3 on this machine, for `demo.py --s3`, and what lies in it. Its server is versitygw, which the tests use too.

Called from: demo.py.
Must never: listen on another address than the loopback, outlive the demo, or read a checkpoint by code of Pillion.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# The server is built, started and ended by what the tests have for it.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
from cluster.harness import binaries
from cluster.harness.machine import HarnessError
from support.object_stores.places import Place
from support.object_stores.servers import serve

NAME = "pillion-demo"
"""Name of the bucket."""


class NoServer(Exception):
    """
    There is no server of S3 here, and none can be built. The text says why.
    """


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """
    An empty bucket, for as long as its server runs.
    """

    place: Place

    @property
    def url(self) -> str:
        return self.place.url

    @property
    def environment(self) -> Mapping[str, str]:
        """
        By which Pillion, and every client of AWS, reaches the bucket. The last variable is for obstore's fsspec alone: Pillion takes an
        http:// endpoint as it is.
        """
        return {**self.place.environment, "AWS_ENDPOINT_URL": self.place.endpoint, "AWS_ALLOW_HTTP": "true"}

    def folders(self, url: str) -> dict[str, tuple[int, int]]:
        """
        The folders below a URL of this bucket: number and bytes of the objects of each.
        """
        prefix = url.removeprefix(f"{self.url}/") + "/"
        found: dict[str, tuple[int, int]] = {}
        for page in self.place.client().list(prefix=prefix):
            for entry in page:
                name = entry["path"].removeprefix(prefix).partition("/")[0]
                number, size = found.get(name, (0, 0))
                found[name] = number + 1, size + entry["size"]
        return found


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Bucket]:
    """
    A bucket whose data lies in a folder, while in ``with``. Says every 15 s how a build goes on.

    Blocks: where the server is not in the cache yet, for minutes, until it is built.

    Raises:
      NoServer: it is not there, and Go is not, or its module is not to be had.
    """
    try:
        binaries.program("versitygw")
    except HarnessError as err:
        raise NoServer(f"--s3 needs versitygw, a server of S3: {err}") from err
    folder.mkdir(parents=True)
    with serve("s3", folder) as server:
        yield Bucket(place=server.make_bucket(NAME))
