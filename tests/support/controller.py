"""
The whole of: a controller that sidecars of a test call home to: HTTPS on a free port, reports kept, answers as the test says.

Called from: tests of the sidecar. It speaks `pillion.wire.home` and nothing more: what a real controller makes of a report is the
operator's tests' business.
Must never: accept a report that does not decode, or hide one that it refused.
"""

import contextlib
import datetime
import http.server
import ipaddress
import os
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pillion.wire import home, names
from support import deadlines
from support.deadlines import Deadline

INTERVAL_S: Final = 0.2
"""Interval that the answers ask for, unless a test sets another. The sidecar still leaves a second between two reports."""
TOKEN: Final = "a-token.of-this_test"


_listening: "weakref.WeakSet[Controller]" = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    # A trainer that was forked while a controller listened would keep its port taken.
    for controller in _listening:
        if controller._server is not None:
            os.close(controller._server.socket.detach())


os.register_at_fork(after_in_child=_leave_to_the_parent)


@final
class Controller:
    """
    See the module. Listens from `start` to `stop`; both may be called again, the port stays.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ca = certificate(folder)
        self.token_file = folder / "token"
        self.token_file.write_text(TOKEN + "\n")
        self.answer = home.Answer(interval_s=INTERVAL_S)
        self.status = 200
        self.location = ""
        """Location header of a redirect, sent with a status of 3xx."""
        self.reports: list[home.Report] = []
        self.tokens: list[str] = []
        self.requests: list[str] = []
        self.connections = 0
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._tls.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        self._server: http.server.ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        _listening.add(self)
        self.start()

    def start(self) -> None:
        controller = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                controller.connections += 1

            def do_POST(self) -> None:
                controller._received(self)

            def do_GET(self) -> None:
                controller._received(self)

            def log_message(self, *_: Any) -> None:
                """Nothing: the test looks at what was kept."""

        class Server(http.server.ThreadingHTTPServer):
            # Reset on close, so that the port is free at once and idle clients see it.
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that does not trust the certificate hangs up."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self._server.socket = self._tls.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        """Connections in use end with their next request."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = self._thread = None

    def env(self, **more: str) -> dict[str, str]:
        """Return the variables that injection sets for a sidecar that calls home to this server."""
        return {
            names.ENV_HOME_URL: f"https://127.0.0.1:{self.port}",
            names.ENV_HOME_CA: self.ca,
            names.ENV_TOKEN_FILE: str(self.token_file),
            names.ENV_POD_NAME: "llm-0",
            names.ENV_POD_NAMESPACE: "team-a",
            names.ENV_POLICY_NAME: "llm",
            names.ENV_JOB_KIND: "Job",
            names.ENV_JOB_NAME: "llm",
            **more,
        }

    def _received(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", "0")))
        status, content = self.status, b"no"
        with self._lock:
            self.requests.append(f"{request.command} {request.path}")
            self.tokens.append(request.headers.get("Authorization", ""))
            if status == 200:
                self.reports.append(home.decode_report(body))
                content = home.encode(self.answer)
        if self._server is None:
            request.close_connection = True
            return
        request.send_response(status)
        if self.location:
            request.send_header("Location", self.location)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    # --- waiting -----------------------------------------------------------------------------------------------------

    def hears(
        self, what: str, matches: Callable[[home.Report], object], deadline: Deadline = Deadline.COMMITTED
    ) -> home.Report:
        """
        The newest report once it matches. Blocks: up to deadline.s.
        """

        def newest() -> home.Report | None:
            report = self.reports[-1] if self.reports else None
            return report if report is not None and matches(report) else None

        found = deadlines.eventually(newest, deadline, f"the controller hears {what}")
        assert found is not None
        return found

    def hears_more(self, number: int = 2) -> home.Report:
        """
        The newest report after so many more, so that it was made after everything that has happened so far.
        """
        wanted = len(self.reports) + number
        deadlines.eventually(lambda: len(self.reports) >= wanted, Deadline.COMMITTED, f"{number} more reports")
        return self.reports[-1]


@contextlib.contextmanager
def listening(folder: Path) -> Iterator[Controller]:
    """A controller, stopped at the end."""
    controller = Controller(folder)
    try:
        yield controller
    finally:
        controller.stop()


def certificate(folder: Path) -> str:
    """Makes `tls.crt` and `tls.key` for 127.0.0.1, signed by itself; the certificate as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's controller")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    (folder / "tls.crt").write_bytes(pem)
    (folder / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem.decode()
