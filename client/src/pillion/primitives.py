"""
`torch.save` archives of numbers and short texts, without a call of torch for each: thousands of counters change at every save.

Called from: `pillion.opaque`. torch.save takes 100 to 500 us for an int, nearly all of it for the ZIP archive around a pickle of ten bytes.
Archives whose pickles are equally long differ in that pickle, in its checksum, and in a record of torch's own that identifies the archive
(no reader looks at it). So torch writes one archive of each length, and the pickle and its checksum are put into copies of it.

The module checks torch's archive first. If it is not built as described, there is no template, and torch.save is called.

Source: torch/serialization.py and caffe2/serialize/inline_container.cc of torch 2.6 and 2.15; APPNOTE.TXT 6.3.10, section 4.3.
"""

from __future__ import annotations

import io
import pickle
import struct
import threading
import zipfile
import zlib
from dataclasses import dataclass
from typing import Final

import torch

TEXT_CHARS: Final = 256
"""Longest text that is archived here. Each length of a pickle needs a template of about 1.5 KiB."""
PICKLE_PROTOCOL: Final = 2
"""torch.save's own (torch.serialization.DEFAULT_PROTOCOL), which every reader knows."""

_TEXT_PICKLE: Final = len(pickle.dumps("", PICKLE_PROTOCOL))
_LOCAL_HEADER: Final = struct.Struct("<26xHH")
"""The two lengths at the end of a ZIP entry's local header: of its name, and of its extra field."""


def is_primitive(leaf: object) -> bool:
    """Whether `archive` may accept the leaf. Types must match exactly: a subclass (an IntEnum) has another pickle."""
    kind = type(leaf)
    if kind is str and isinstance(leaf, str):
        return len(leaf) <= TEXT_CHARS
    return leaf is None or kind is bool or kind is int or kind is float


@dataclass(frozen=True, slots=True)
class _Template:
    """An archive, cut at the pickle and at its two checksums."""

    before: bytes
    between: bytes
    inner: bytes
    after: bytes

    def filled(self, pickled: bytes) -> bytes:
        checksum = zlib.crc32(pickled).to_bytes(4, "little")
        return b"".join((self.before, pickled, self.between, checksum, self.inner, checksum, self.after))


_templates: dict[int, _Template | None] = {}
"""Length of a pickle -> its template. None if torch writes archives of another form."""
_making = threading.Lock()


def archive(leaf: object) -> bytes | None:
    """
    Return the archive of a primitive. Equal leaves have equal archives, on every rank. None: only torch.save can make it.

    Called from: a thread with no mode of torch on.
    """
    pickled = pickle.dumps(leaf, PICKLE_PROTOCOL)
    try:
        template = _templates[len(pickled)]
    except KeyError:
        template = _make(leaf, len(pickled))
    return None if template is None else template.filled(pickled)


def _make(leaf: object, length: int) -> _Template | None:
    with _making:
        if length not in _templates:
            # A stand-in instead of the first value: ranks have different first values, and compare their archives.
            stand_in = "x" * (length - _TEXT_PICKLE) if length >= _TEXT_PICKLE else leaf
            _templates[length] = _checked(_template(_saved(stand_in), pickle.dumps(stand_in, PICKLE_PROTOCOL)), leaf)
        return _templates[length]


def _saved(leaf: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(leaf, buffer)
    return buffer.getvalue()


def _template(archive: bytes, pickled: bytes) -> _Template | None:
    """The template in an archive of a stand-in. Pure."""
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        for entry in entries.infolist():
            if entry.filename.endswith("/.data/serialization_id"):
                identity = entries.read(entry)
                nothing = b"0" * len(identity)
                # The id depends on the stand-in's checksum, so it would be wrong in the copies.
                archive = archive.replace(identity, nothing).replace(_checksum(identity), _checksum(nothing))
        first = next((entry for entry in entries.infolist() if entry.filename.endswith("/data.pkl")), None)
    if first is None:
        return None
    name, extra = _LOCAL_HEADER.unpack_from(archive, first.header_offset)
    start = first.header_offset + _LOCAL_HEADER.size + name + extra
    end = start + len(pickled)
    parts = archive[end:].split(_checksum(pickled))
    # One checksum stands behind the pickle, one in the directory at the end.
    if archive[start:end] != pickled or len(parts) != 3:
        return None
    return _Template(archive[:start], *parts)


def _checked(template: _Template | None, leaf: object) -> _Template | None:
    """Return the template, if torch reads the leaf back from it."""
    if template is None:
        return None
    try:
        read = torch.load(io.BytesIO(template.filled(pickle.dumps(leaf, PICKLE_PROTOCOL))), weights_only=True)
    except Exception:  # any error of torch for an archive that it cannot read
        return None
    return template if type(read) is type(leaf) and repr(read) == repr(leaf) else None


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")
