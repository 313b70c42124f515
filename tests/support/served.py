"""
The whole of: an application served as the operator serves its ports, with TLS and a certificate of its own, inside one event loop.

Called from: the tests of connections, bodies and the webhook's server.
Must never: do otherwise than the operator: `listener.Listener` opens the port, `serving.Serving` has the certificate.
"""

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any, Final

import aiohttp
from aiohttp import web

from pillion_operator.certificates import issue, serving
from pillion_operator.listener import Listener
from support.deadlines import Deadline

HOST: Final = "127.0.0.1"
NOW: Final = datetime.datetime.now(UTC)
AUTHORITY: Final = issue.make_authority(NOW)
LEAF: Final = issue.make_leaf(AUTHORITY, [HOST], NOW)
MATERIAL: Final = serving.Material(chain=LEAF.chain, key=LEAF.key, authority=AUTHORITY.certificate)


class Served:
    """A port, and how to reach it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"https://{HOST}:{port}/mutate"
        self.context = ssl.create_default_context(cadata=AUTHORITY.certificate)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that has shaken hands, and says nothing."""
        return await asyncio.open_connection(HOST, self.port, ssl=self.context)

    async def post(
        self, session: aiohttp.ClientSession, body: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        async with session.post(self.url, data=body, ssl=self.context, headers=headers) as answer:
            return answer.status, await answer.read()


@asynccontextmanager
async def serve(application: web.Application, *, client_authority: str = "") -> AsyncIterator[Served]:
    """The application on a free port; with an authority, clients have to show a certificate of it."""
    nobody: Any = None
    served = serving.Serving(nobody, "system", "pillion-tls", client_authority=client_authority)
    assert served.take(MATERIAL)
    async with Listener(
        application, address=HOST, port=0, context=served.context, keep_alive_s=60.0, close_s=1.0
    ) as door:
        yield Served(door.port)


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """Return the bytes that arrive until the other side closes. Blocks: until then, within a deadline."""
    found = b""
    async with asyncio.timeout(Deadline.REPLY.s):
        try:
            while chunk := await reader.read(65536):
                found += chunk
        except OSError:
            pass
    return found
