"""
A store that takes everything and keeps nothing: the floor of an upload, as fast as the loopback and one core allow.

    python benchmarks/object_sink.py          prints its port, serves until its standard input ends

Speaks the part of S3 that an upload and a ranged read need: PUT (also of parts), POST (begin and end of a multipart upload), GET with a range,
HEAD, and an empty listing. Every object that is read has the same bytes. Called from: bench_objects.py, as a process of its own.
"""

from __future__ import annotations

import http.server
import mmap
import os
import sys
import threading
import urllib.parse

BLOCK_BYTES = 1 << 20
OBJECT_BYTES = 1 << 30
"""Length that every object has for who reads."""


class Sink(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    source = memoryview(mmap.mmap(-1, 64 << 20))

    def log_message(self, *_: object) -> None:
        pass

    def _take(self) -> None:
        left, block = int(self.headers.get("content-length", 0)), bytearray(BLOCK_BYTES)
        if self.headers.get("expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        view = memoryview(block)
        while left:
            taken = self.rfile.readinto(view[: min(left, BLOCK_BYTES)])
            if not taken:
                return
            left -= taken

    def _say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self._take()
        self._say(200, ETag='"sink"')

    def do_POST(self) -> None:
        self._take()
        query = urllib.parse.urlsplit(self.path).query
        if "uploads" in query:
            self._say(200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        else:
            self._say(200, b'<CompleteMultipartUploadResult><ETag>"sink"</ETag></CompleteMultipartUploadResult>')

    def do_DELETE(self) -> None:
        self._say(204)

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("Content-Length", str(OBJECT_BYTES)), ("ETag", '"sink"'), _CHANGED):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        if "list-type" in self.path:
            self._say(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
            return
        first, _, last = self.headers.get("range", f"bytes=0-{OBJECT_BYTES - 1}").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or OBJECT_BYTES - 1), OBJECT_BYTES - 1) + 1
        self.send_response(206)
        for name, value in (
            ("Content-Range", f"bytes {start}-{end - 1}/{OBJECT_BYTES}"),
            ("Content-Length", str(end - start)),
            ("ETag", '"sink"'),
            _CHANGED,
        ):
            self.send_header(name, value)
        self.end_headers()
        while start < end:
            start += self.connection.send(self.source[: min(end - start, len(self.source))])


_CHANGED = ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
