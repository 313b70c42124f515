"""
The whole of: the servers of the object stores, each on a free port of the loopback, with its data in a folder of the test's.

Called from: `fixtures`.
Must never: listen elsewhere, or leave its process behind.
"""

import base64
import contextlib
import email.utils
import hashlib
import hmac
import http.client
import itertools
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, final

import psutil

from support import deadlines
from support.deadlines import Deadline
from support.object_stores import programs
from support.object_stores.fake_gcs import FakeGcs
from support.object_stores.places import REGION, Kind, Place

_ACCOUNT: Final = "pilliontests"
_SECRET: Final = base64.b64encode(b"not a secret: a server on loopback, for a test").decode()
_AZURE_VERSION: Final = "2023-11-03"
_NAMES: Final = itertools.count()


class Server(Protocol):
    """
    A store that makes buckets.
    """

    kind: Kind

    def make_bucket(self, name: str | None = None) -> Place:
        """
        A new bucket, empty. Without a name it gets one that no other has.
        """


@contextlib.contextmanager
def serve(kind: Kind, folder: Path) -> Iterator[Server]:
    """
    A server of that kind, while in ``with``. Skips the test, or in CI fails it, where its program is not there.

    Args:
        folder: for its data and its log; empty.

    Blocks: up to Deadline.PROCESS_START.
    """
    match kind:
        case "gcs":
            with FakeGcs() as fake:
                yield _Gcs(fake)
        case "s3":
            data = folder / "data"
            data.mkdir()
            keys = {"ROOT_ACCESS_KEY": _ACCOUNT, "ROOT_SECRET_KEY": _SECRET}
            options = ("--quiet", "--port", "127.0.0.1:0", "--region", REGION, "posix", str(data))
            with _running([str(programs.versitygw()), *options], folder, keys) as port:
                yield _Versitygw(port, data)
        case "azure":
            listen = ("--blobHost", "127.0.0.1", "--blobPort", "0")
            # It takes any version of the API, and tells nobody that it runs.
            quiet = ("--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry")
            accounts = {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{_SECRET}"}
            with _running(["node", str(programs.azurite()), *listen, *quiet], folder, accounts) as port:
                yield _Azurite(port)


@final
class _Versitygw:
    kind: Kind = "s3"

    def __init__(self, port: int, data: Path) -> None:
        self._port = port
        self._data = data

    def make_bucket(self, name: str | None = None) -> Place:
        # A bucket is a folder.
        place = Place(kind=self.kind, port=self._port, bucket=name or _name(), account=_ACCOUNT, secret=_SECRET)
        (self._data / place.bucket).mkdir()
        return place


@final
class _Gcs:
    kind: Kind = "gcs"

    def __init__(self, fake: FakeGcs) -> None:
        self._fake = fake

    def make_bucket(self, name: str | None = None) -> Place:
        place = Place(kind=self.kind, port=self._fake.port, bucket=name or _name(), account="", secret="")
        self._fake.make_bucket(place.bucket)
        return place


@final
class _Azurite:
    kind: Kind = "azure"

    def __init__(self, port: int) -> None:
        self._port = port

    def make_bucket(self, name: str | None = None) -> Place:
        place = Place(kind=self.kind, port=self._port, bucket=name or _name(), account=_ACCOUNT, secret=_SECRET)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=Deadline.REPLY.s)
        with contextlib.closing(connection):
            connection.request("PUT", f"/{_ACCOUNT}/{place.bucket}?restype=container", headers=_signed(place.bucket))
            answer = connection.getresponse()
            assert answer.status == 201, (answer.status, answer.read())
        return place


def _signed(container: str) -> dict[str, str]:
    """
    The headers of a request that makes a container, with a shared key:
    https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key. The account is twice in the path, as the emulator wants it.
    """
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": _AZURE_VERSION}
    said = "".join(f"{name}:{value}\n" for name, value in headers.items())
    text = f"PUT{chr(10) * 12}{said}/{_ACCOUNT}/{_ACCOUNT}/{container}\nrestype:container"
    digest = hmac.digest(base64.b64decode(_SECRET), text.encode(), hashlib.sha256)
    return {
        **headers,
        "Content-Length": "0",
        "Authorization": f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}",
    }


@contextlib.contextmanager
def _running(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """The port that it listens on."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        )
    try:

        def port() -> int:
            assert process.poll() is None, (
                f"{command[0]} ended by status {process.returncode}: {log.read_text()[-2000:]}"
            )
            sockets = psutil.Process(process.pid).net_connections(kind="tcp")
            return next((each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN), 0)

        yield deadlines.eventually(port, Deadline.PROCESS_START, f"{command[0]} listens")
    finally:
        process.kill()
        process.wait(Deadline.PROCESS_EXIT.s)


def _name() -> str:
    return f"tests-{os.getpid()}-{next(_NAMES)}"
