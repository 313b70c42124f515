"""
The head of a local copy: a small file that says what the image beside it holds. A copy is whole if its head is there.

Producer and consumer: `copies.disk`. Both are processes of one pod, but a copy may outlive the release that wrote it: a head of another form is
refused, and its copy is not used.

    step-20-3-1.image     the slot's image, as it lay in the arena
    step-20-3-1.head      digest of the rest, a line; then this document
    step-20-3-1.held      (empty) every pod of the job has its copy
    step-20-3-1.stored    (empty) the save is committed on storage
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from pillion.wire import codec, home
from pillion_sidecar.storage.generation import Order

VERSION: Final = 1
_STEM: Final = re.compile(r"step-(\d{1,19})-(\d{1,19})-(\d{1,10})")


class Copy(NamedTuple):
    """A save that a local copy is of. Copies are ordered as checkpoints are: by the order of their seals, then by step."""

    order: Order
    step: int

    @property
    def stem(self) -> str:
        """Name of the copy's files, without their endings."""
        generation, epoch = self.order
        return f"step-{self.step}-{generation}-{epoch}"


def parse_stem(text: str) -> Copy | None:
    """Return the copy that a file's name is of; None: it is no copy's."""
    found = _STEM.fullmatch(text)
    return None if found is None else Copy((int(found[2]), int(found[3])), int(found[1]))


class HeadError(ValueError):
    """A head that cannot be used. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """See the module."""

    rank: int
    world_size: int
    run_id: str
    image_bytes: int
    layout: str
    """Encoded `wire.layout`."""
    opaque_lengths: tuple[int, ...]
    digests: tuple[str, ...]
    """Of the archives in the image: the items, then the opaque leaves."""
    wanted: bool
    """Whether the save is to go to storage. False: it was due by `trigger.localSteps` alone."""
    started_ns: int
    """When the save began, wall clock; 0: nobody knows."""
    cause: home.Cause
    remarks: Mapping[str, Any] = field(default_factory=dict)
    """What the script said about the save: the document of `wire.remarks`."""
    version: int = VERSION

    def encode(self) -> bytes:
        text = json.dumps(codec.write(self), separators=(",", ":")).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest().encode() + b"\n" + text


def decode(data: bytes) -> Head:
    """
    Read a head.

    Raises:
        HeadError: the bytes are damaged, or of another release's form.
    """
    digest, _, text = data.partition(b"\n")
    if hashlib.blake2b(text, digest_size=16).hexdigest().encode() != digest:
        raise HeadError("does not match its digest")
    try:
        document: Any = json.loads(text)
        head: Head = codec.read(Head, document)
    except (ValueError, RecursionError, codec.Wrong) as err:
        raise HeadError(f"is not of this release: {err!s:.200}") from err
    if head.version != VERSION:
        raise HeadError(f"has version {head.version}, this release reads {VERSION}")
    return head
