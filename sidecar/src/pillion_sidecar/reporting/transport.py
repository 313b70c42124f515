"""
Sends one report over HTTPS, and reads the answer.

Called from: `reporting.reporter`, in a separate thread, because every call blocks.
Must never: follow a redirect (the token is for one address), send without TLS, or write the token to a log or an error.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import ssl
from typing import Final
from urllib.parse import urlsplit

from pillion.wire import home

OPERATION_TIMEOUT_S: Final = 10.0
"""Timeout for each step of a call: connect, handshake, send, receive. The controller answers in milliseconds. It gives up after the same
time, when it asks the API server about the token."""
REASON_LIMIT: Final = 300
"""Maximum bytes that are read of a refusal's text."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]{1,16384}")


class CallFailed(Exception):
    """The call got no valid answer. The text has the cause, and never the token."""


class Refused(CallFailed):
    """The controller answered with another status than 200."""


class Transport:
    """
    The connection to the controller, kept alive from call to call.

    Args:
        url: address of the controller, https://host[:port][/prefix].
        ca: certificates (PEM) that verify the server. Empty: the system's certificates.
        token_file: file with the token. It is read for every call, because the kubelet renews it.

    Raises:
        ValueError: the URL is not an https address, or `ca` has no certificate.
    """

    def __init__(self, url: str, *, ca: str, token_file: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise ValueError(f"{url!r} is no https:// address")
        try:
            self._tls = ssl.create_default_context(cadata=ca or None)
        except ssl.SSLError as err:
            raise ValueError(f"no certificate can be read from what the server is to be trusted by: {err}") from err
        self._host, self._port = parts.hostname, parts.port or 443
        self._path = parts.path.rstrip("/") + home.REPORT_PATH
        self._token_file = token_file
        self._connection: http.client.HTTPSConnection | None = None

    def post(self, report: bytes) -> home.Answer:
        """
        Send a report. Return the answer.

        Blocks: up to OPERATION_TIMEOUT_S for each step.

        Raises:
            Refused: the controller refused the report.
            CallFailed: there is no answer, or it is not an answer of this protocol.
        """
        token = self._token()
        if self._connection is not None:
            # The controller closes connections that were idle for some seconds. A report that arrives twice does no harm.
            with contextlib.suppress(ConnectionError, http.client.BadStatusLine):
                return self._exchange(self._connection, report, token)
            self.close()
        self._connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=OPERATION_TIMEOUT_S, context=self._tls
        )
        try:
            return self._exchange(self._connection, report, token)
        except (ConnectionError, http.client.BadStatusLine) as err:
            self.close()
            raise CallFailed(f"{self._host}: {str(err) or type(err).__name__}") from None

    def _token(self) -> str:
        try:
            with open(self._token_file, encoding="ascii") as file:
                token = file.read().strip()
        except (OSError, UnicodeDecodeError) as err:
            reason = err.strerror if isinstance(err, OSError) else "it is no text"
            raise CallFailed(f"the token file {self._token_file} cannot be read: {reason}") from None
        if not _TOKEN.fullmatch(token):
            raise CallFailed(f"the token file {self._token_file} holds no token")
        return token

    def _exchange(self, connection: http.client.HTTPSConnection, report: bytes, token: str) -> home.Answer:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        try:
            connection.request("POST", self._path, report, headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                text = response.read(REASON_LIMIT).decode(errors="replace").strip()
                self.close()  # so that the unread rest of the body is dropped
                raise Refused(f"{response.status} {response.reason}: {text}")
            body = response.read(home.MAX_REPORT_BYTES + 1)
            if not response.isclosed():
                self.close()
            return home.decode_answer(body)
        except home.BadReport as err:
            self.close()
            raise CallFailed(str(err)) from None
        except (ConnectionError, http.client.BadStatusLine):
            raise
        except (OSError, http.client.HTTPException) as err:
            self.close()
            raise CallFailed(f"{self._host}: {str(err) or type(err).__name__}") from None

    def close(self) -> None:
        """Close the connection. The next call opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
