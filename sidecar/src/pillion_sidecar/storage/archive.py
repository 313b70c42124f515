"""
The `torch.save` archive around a tensor's bytes, made by hand. No other module knows how one tensor lies in a `.distcp` file.

The trainer copies a payload into its slot, with room before and after it. The sidecar fills the two rooms with the results of `head` and
`tail`. From then on the slot is the file: it is written as it lies, without a copy and without torch. Stock
`torch.load(..., weights_only=True)` reads the file as a contiguous tensor.

| offset | size | what |
|---|---|---|
| 0 | HEAD_BYTES | entries `data.pkl`, `version`, `byteorder`; the header of `data/0`, whose extra field fills the room |
| HEAD_BYTES | payload_bytes | the payload: entry `data/0`, stored |
| ... | 0 to ALIGNMENT - 1 | up to the next multiple of ALIGNMENT; belongs to no entry, any bytes |
| HEAD_BYTES + padded | TAIL_BYTES | zeros, then the central directory, then the end records, which end with the room |

The archive is a ZIP archive: all integers little-endian, all entries stored. The CRC of `data/0` is 0, because a pass over the payload would
cost as much as the rest of the save, and torch does not check it (`unzip -t` and `zipfile.read` do). The manifest has a digest of each
payload instead. The small entries have their true CRC.

Called from: the sidecar's writer, for every tensor of every save. Results are cached, because a model has few shapes.
This module must never import torch, read a payload, or do I/O.

Source: APPNOTE.TXT 6.3.10 (sections 4.3 and 4.5.3), torch/serialization.py and caffe2/serialize/inline_container.cc of
torch 2.6 and 2.15; "CRC compiled out": pytorch#126952.
"""

import functools
import math
import struct
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pillion_sidecar.storage import pickle_opcodes

HEAD_BYTES: Final = 1024
"""Size of the room before each payload, bytes. It holds any shape of up to 50 dimensions, and keeps the payload aligned."""

TAIL_BYTES: Final = 512
"""Size of the room after each padded payload, bytes. At most 364 of them are used, the rest are zeros."""

ALIGNMENT: Final = 64
"""Alignment of the payload within the archive, bytes, as torch.save has it. A memory-mapped load needs it."""

# torch.save writes the typed storage class for the dtypes that existed before torch 1.13, and rebuilds with v2.
_STORAGE_CLASSES: Final[Mapping[str, tuple[str, int]]] = {
    "bfloat16": ("BFloat16Storage", 2),
    "bool": ("BoolStorage", 1),
    "complex128": ("ComplexDoubleStorage", 16),
    "complex64": ("ComplexFloatStorage", 8),
    "float16": ("HalfStorage", 2),
    "float32": ("FloatStorage", 4),
    "float64": ("DoubleStorage", 8),
    "int16": ("ShortStorage", 2),
    "int32": ("IntStorage", 4),
    "int64": ("LongStorage", 8),
    "int8": ("CharStorage", 1),
    "uint8": ("ByteStorage", 1),
}

# All other dtypes have an UntypedStorage with the dtype beside it, and are rebuilt with v3. The last three came after torch 2.6.
# The bits dtypes are missing because stock DCP can neither save nor load them (it finds no item size). The quantized dtypes are missing
# because their scale is not part of their bytes.
_UNTYPED: Final[Mapping[str, int]] = {
    "complex32": 4,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bcomplex32": 4,
    "float4_e2m1fn_x2": 1,
    "float8_e8m0fnu": 1,
}

SUPPORTED_DTYPES: Final[Mapping[str, int]] = MappingProxyType(
    {name: itemsize for name, (_, itemsize) in _STORAGE_CLASSES.items()} | dict(_UNTYPED)
)
"""Item sizes in bytes of the dtypes that stock DCP stores, by torch's names without "torch."."""

_LOCAL_HEADER: Final = struct.Struct("<4s5H3L2H")
_CENTRAL_HEADER: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_END_ZIP64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_ZIP64: Final = struct.Struct("<4sLQL")
_SIZES_ZIP64: Final = struct.Struct("<2H2Q")

_VERSION_NEEDED: Final = 45
"""Version 4.5 of the format, the first with ZIP64. All entries have it, which every reader accepts."""

_DOS_DATE: Final = (1 << 5) | 1
"""Date 1980-01-01, the zero of the format. A true date would make equal tensors unequal bytes."""

_UINT32_MAX: Final = 0xFFFFFFFF

# The padding is an extra field with the id "FB", as torch.save has it: 2 bytes of id, 2 of length, then filler.
_PADDING_ID: Final = int.from_bytes(b"FB", "little")
_PADDING_HEADER: Final = struct.Struct("<2H")

_PAYLOAD_NAME: Final = b"archive/data/0"

_CACHE_SIZE: Final = 4096
"""Maximum of (dtype, shape) pairs in a cache: 1.5 KiB each, so at most 6 MiB."""


def archive_bytes(payload_bytes: int) -> int:
    """
    Return the size in bytes of the archive around a payload of `payload_bytes` bytes. It is a multiple of ALIGNMENT.

    Raises: ValueError if `payload_bytes` is negative.
    Blocks: never.
    """
    if payload_bytes < 0:
        raise ValueError(f"payload_bytes is {payload_bytes}; a size in bytes is not negative")
    return _directory_end(payload_bytes)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def head(dtype: str, sizes: tuple[int, ...], payload_bytes: int) -> bytes:
    """
    Return the HEAD_BYTES bytes directly before the payload.

    Args:
      dtype: a key of SUPPORTED_DTYPES.
      sizes: the shape; `()` for a tensor of no dimension, and any size may be 0.
      payload_bytes: size of the payload in bytes, without padding: the product of `sizes` times the item size.

    Raises: ValueError if the dtype is not known, the shape and `payload_bytes` disagree, or the shape has too many dimensions for the room.
    Blocks: never.
    """
    entries, before_payload_bytes = _small_entries(dtype, sizes, payload_bytes)
    sizes_zip64 = _sizes_zip64(payload_bytes)
    fixed_bytes = before_payload_bytes + _LOCAL_HEADER.size + len(_PAYLOAD_NAME) + len(sizes_zip64)
    filler_bytes = HEAD_BYTES - fixed_bytes - _PADDING_HEADER.size
    if filler_bytes < 0:
        raise ValueError(
            f"a tensor of shape {sizes} has too many dimensions: its head needs {HEAD_BYTES - filler_bytes} bytes, "
            f"and there are {HEAD_BYTES}"
        )
    extra = sizes_zip64 + _PADDING_HEADER.pack(_PADDING_ID, filler_bytes) + b"Z" * filler_bytes
    small = b"".join(_local_header(name, zlib.crc32(data), len(data), b"") + data for name, data in entries)
    return small + _local_header(_PAYLOAD_NAME, 0, payload_bytes, extra)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def tail(dtype: str, sizes: tuple[int, ...], payload_bytes: int) -> bytes:
    """
    Return the TAIL_BYTES bytes directly after the payload and its padding to a multiple of ALIGNMENT.

    Arguments and errors are those of `head`.

    Blocks: never.
    """
    entries, payload_header_offset = _small_entries(dtype, sizes, payload_bytes)
    directory = bytearray()
    offset = 0
    for name, data in entries:
        directory += _central_header(name, zlib.crc32(data), len(data), offset)
        offset += _LOCAL_HEADER.size + len(name) + len(data)
    directory += _central_header(_PAYLOAD_NAME, 0, payload_bytes, payload_header_offset)
    num_entries = len(entries) + 1

    end_offset = _directory_end(payload_bytes) - _END.size
    directory_offset = end_offset - len(directory)
    end_zip64 = b""
    if directory_offset >= _UINT32_MAX:
        end_zip64_offset = end_offset - _LOCATOR_ZIP64.size - _END_ZIP64.size
        directory_offset = end_zip64_offset - len(directory)
        # The size in an end record does not count the record's own first 12 bytes (4.3.14.1).
        end_zip64 = _END_ZIP64.pack(
            b"PK\x06\x06", _END_ZIP64.size - 12, _VERSION_NEEDED, _VERSION_NEEDED, 0, 0,
            num_entries, num_entries, len(directory), directory_offset,
        ) + _LOCATOR_ZIP64.pack(b"PK\x06\x07", 0, end_zip64_offset, 1)  # fmt: skip
    end = _END.pack(
        b"PK\x05\x06", 0, 0, num_entries, num_entries, len(directory), min(directory_offset, _UINT32_MAX), 0
    )
    return (bytes(directory) + end_zip64 + end).rjust(TAIL_BYTES, b"\0")


def _directory_end(payload_bytes: int) -> int:
    padded_bytes = (payload_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return HEAD_BYTES + padded_bytes + TAIL_BYTES


def _small_entries(dtype: str, sizes: tuple[int, ...], payload_bytes: int) -> tuple[list[tuple[bytes, bytes]], int]:
    """Return the entries before the payload's, as (name, content), and their size in bytes with their headers."""
    entries = [
        (b"archive/data.pkl", _data_pickle(dtype, sizes, payload_bytes)),
        (b"archive/version", b"3\n"),
        (b"archive/byteorder", b"little"),
    ]
    return entries, sum(_LOCAL_HEADER.size + len(name) + len(data) for name, data in entries)


def _data_pickle(dtype: str, sizes: tuple[int, ...], payload_bytes: int) -> bytes:
    """Return the pickle that torch.save writes for a contiguous tensor on the CPU without gradient, without the memo opcodes."""
    itemsize = SUPPORTED_DTYPES.get(dtype)
    if itemsize is None:
        raise ValueError(f"dtype {dtype!r} cannot be stored; known are {', '.join(sorted(SUPPORTED_DTYPES))}")
    if any(size < 0 for size in sizes):
        raise ValueError(f"a tensor has no negative sizes, and {sizes} has one")
    num_items = math.prod(sizes)
    if num_items * itemsize != payload_bytes:
        raise ValueError(f"a {dtype} tensor of shape {sizes} has {num_items * itemsize} bytes, not {payload_bytes}")

    if dtype in _STORAGE_CLASSES:
        storage_class, _ = _STORAGE_CLASSES[dtype]
        rebuild = pickle_opcodes.push_global("torch._utils", "_rebuild_tensor_v2")
        storage = pickle_opcodes.push_global("torch", storage_class)
        storage_size = num_items
        dtype_argument = b""
    else:
        rebuild = pickle_opcodes.push_global("torch._utils", "_rebuild_tensor_v3")
        storage = pickle_opcodes.push_global("torch.storage", "UntypedStorage")
        storage_size = payload_bytes
        dtype_argument = pickle_opcodes.push_global("torch", dtype)
    # rebuild(persistent("storage", class, key, device, size), offset, sizes, strides, requires_grad, hooks[, dtype])
    return b"".join(
        (
            b"\x80\x02",
            rebuild,
            b"(",
            b"(",
            pickle_opcodes.push_str("storage"),
            storage,
            pickle_opcodes.push_str("0"),
            pickle_opcodes.push_str("cpu"),
            pickle_opcodes.push_int(storage_size),
            b"tQ",
            pickle_opcodes.push_int(0),
            pickle_opcodes.push_ints(sizes),
            pickle_opcodes.push_ints(_contiguous_strides(sizes)),
            b"\x89",
            pickle_opcodes.push_global("collections", "OrderedDict"),
            b")R",
            dtype_argument,
            b"tR.",
        )
    )


def _contiguous_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return row-major strides in items. A size of 0 counts as 1, as in torch."""
    strides = []
    stride = 1
    for size in reversed(sizes):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


def _sizes_zip64(num_bytes: int) -> bytes:
    """Return the ZIP64 extra field with both sizes of a stored entry; empty if 32 bits hold the sizes (4.5.3)."""
    return b"" if num_bytes < _UINT32_MAX else _SIZES_ZIP64.pack(1, 16, num_bytes, num_bytes)


def _local_header(name: bytes, crc: int, num_bytes: int, extra: bytes) -> bytes:
    size = min(num_bytes, _UINT32_MAX)
    fields = (_VERSION_NEEDED, 0, 0, 0, _DOS_DATE, crc, size, size, len(name), len(extra))
    return _LOCAL_HEADER.pack(b"PK\x03\x04", *fields) + name + extra


def _central_header(name: bytes, crc: int, num_bytes: int, local_header_offset: int) -> bytes:
    size = min(num_bytes, _UINT32_MAX)
    extra = _sizes_zip64(num_bytes)
    fields = (_VERSION_NEEDED, _VERSION_NEEDED, 0, 0, 0, _DOS_DATE, crc, size, size, len(name), len(extra))
    return _CENTRAL_HEADER.pack(b"PK\x01\x02", *fields, 0, 0, 0, 0, local_header_offset) + name + extra
