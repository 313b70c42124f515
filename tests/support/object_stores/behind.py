"""
The whole of: what lies in a bucket of S3, seen without Pillion: its files, its committed checkpoints, and uploads that nobody ended.

Called from: tests of whole runs with a bucket as their root.
Must never: read by the code that it checks.
"""

import datetime
import hashlib
import hmac
import http.client
import re
import urllib.parse
from pathlib import Path
from typing import Final

from support.deadlines import Deadline
from support.object_stores.places import REGION, Place

_STEP: Final = re.compile(r"step-(\d+)/\.metadata")
_TOMBSTONE_MOST: Final = 64
"""Bytes: what is shorter is no `.metadata` of torch."""


def files(place: Place, folder: str) -> dict[str, int]:
    """
    The objects below a folder, by their names in it, with their bytes.
    """
    listed = place.client().list(prefix=folder).collect()
    return {each["path"].removeprefix(f"{folder}/"): each["size"] for each in listed}


def committed(place: Place, folder: str) -> list[int]:
    """
    The steps of a root that have a commit marker, ascending.
    """
    found = [
        match[1]
        for name, size in files(place, folder).items()
        if size > _TOMBSTONE_MOST and (match := _STEP.fullmatch(name))
    ]
    return sorted(map(int, found))


def download(place: Place, folder: str, target: Path) -> Path:
    """
    Copy a folder of the bucket into a directory, for what reads directories.
    """
    client = place.client()
    for name in files(place, folder):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(client.get(f"{folder}/{name}").bytes())
    return target


def unended_uploads(place: Place) -> list[str]:
    """
    The keys of the multipart uploads that were begun and not ended: no listing shows them, and a cloud bills them.
    """
    return re.findall(r"<Upload>.*?<Key>(.*?)</Key>", _ask(place, "GET", f"/{place.bucket}", "uploads="), re.DOTALL)


def begin_upload(place: Place, key: str) -> None:
    """
    Begin one, and leave it.
    """
    _ask(place, "POST", f"/{place.bucket}/{key}", "uploads=")


def _ask(place: Place, method: str, path: str, query: str) -> str:
    """
    A request without a body, signed as https://docs.aws.amazon.com/IAM/latest/UserGuide/create-signed-request.html has it: obstore has no call
    for it.
    """
    assert place.kind == "s3"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    empty = hashlib.sha256(b"").hexdigest()
    headers = {"host": f"127.0.0.1:{place.port}", "x-amz-content-sha256": empty, "x-amz-date": now}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = f"{method}\n{urllib.parse.quote(path)}\n{query}\n{lines}\n{names}\n{empty}"
    scope = f"{now[:8]}/{REGION}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{place.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), hashlib.sha256)
    signature = hmac.digest(key, text.encode(), hashlib.sha256).hex()
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={place.account}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=Deadline.REPLY.s)
    try:
        connection.request(method, f"{path}?{query}", headers=headers)
        answer = connection.getresponse()
        said = answer.read().decode()
    finally:
        connection.close()
    assert answer.status == 200, (answer.status, said)
    return said
