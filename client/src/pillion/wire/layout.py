"""
The layout: where each leaf of a rank's state lies in a slot's image. Pure; trainer and sidecar compute the same result.

Producer: the client (from the state dict). Consumer: the sidecar's executor, the loader.
A slot's image has the same bytes as the file on storage. Around the payload of each tensor there is room for the head and the tail of a
`torch.save` archive. So the sidecar writes arena memory to the disk without a copy, and stock DCP can read the file.

    | what                      | bytes                         | written by |
    |---------------------------|-------------------------------|------------|
    | head of item i            | 1024                          | sidecar, once per layout |
    | payload of item i         | prod(sizes) * itemsize        | trainer, each save       |
    | padding                   | up to a multiple of 64        | nobody                   |
    | tail of item i            | 512                           | sidecar, once per layout |
    | ... next item ...         |                               |            |
    | opaque leaf j             | its length, padded to 64      | trainer, each save       |

Breaking: changing one of the three constants, or the order. Not breaking: a new key in the document.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 1024
TAIL_BYTES: Final = 512
ALIGNMENT_BYTES: Final = 64
"""Alignment of payloads within an archive, the same as torch's. It suits every dtype and vector copies."""

ITEMSIZE_BYTES: Final[Mapping[str, int]] = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex32": 4, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1, "bcomplex32": 4,
}  # fmt: skip
"""dtype name (torch's, without "torch.") -> bytes of an element. Tensors of other dtypes are opaque leaves."""


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Item:
    """One chunk of one tensor, as one rank holds it."""

    fqn: str
    dtype: str
    size: tuple[int, ...]
    """Global shape of the tensor."""
    offsets: tuple[int, ...]
    """Start of the chunk in the global tensor."""
    sizes: tuple[int, ...]
    """Shape of the chunk."""

    @property
    def payload_bytes(self) -> int:
        return math.prod(self.sizes) * ITEMSIZE_BYTES[self.dtype]

    @property
    def key(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Identity of the chunk. Chunks of two ranks with equal keys are replicas, and one of them is written."""
        return (self.fqn, self.offsets, self.sizes)


@dataclass(frozen=True)
class Layout:
    """All items of a rank in their order, the names of its opaque leaves, and the path of every leaf."""

    items: tuple[Item, ...]
    opaque: tuple[str, ...]
    """FQNs of the leaves that only the trainer can read. Their lengths change from save to save."""
    paths: Mapping[str, tuple[str | int, ...]]
    """FQN -> keys in the nested state dict (DCP's planner_data)."""

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Offset of each item's archive in the image, bytes."""
        starts, cursor = [], 0
        for item in self.items:
            starts.append(cursor)
            cursor += HEAD_BYTES + aligned(item.payload_bytes) + TAIL_BYTES
        return tuple(starts)

    @functools.cached_property
    def payload_starts(self) -> tuple[int, ...]:
        return tuple(start + HEAD_BYTES for start in self.starts)

    @functools.cached_property
    def tensors_bytes(self) -> int:
        """Length of the tensor part of the image. The opaque leaves follow it."""
        if not self.items:
            return 0
        return self.starts[-1] + HEAD_BYTES + aligned(self.items[-1].payload_bytes) + TAIL_BYTES

    def end(self, index: int) -> int:
        """Return the end offset of the archive of item `index`."""
        return self.starts[index + 1] if index + 1 < len(self.starts) else self.tensors_bytes

    @functools.cached_property
    def encoded(self) -> bytes:
        """Canonical JSON. Equal layouts have equal bytes."""
        return json.dumps(
            {
                "version": 1,
                "items": [[i.fqn, i.dtype, i.size, i.offsets, i.sizes] for i in self.items],
                "opaque": self.opaque,
                "paths": self.paths,
            },
            separators=(",", ":"),
        ).encode()

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.blake2b(self.encoded, digest_size=16).hexdigest()

    def opaque_starts(self, lengths_bytes: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Return the offsets of opaque leaves of these lengths, and the length of the whole image."""
        rooms = [-(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for length in lengths_bytes]
        *starts, end = itertools.accumulate(rooms, initial=self.tensors_bytes)
        return tuple(starts), end


def decode(encoded: bytes) -> Layout:
    """
    Read a layout.

    Raises:
        ValueError: not a layout, or an invalid one (an unknown dtype, a negative size, a chunk out of bounds).
    """
    try:
        document = json.loads(encoded)
        items = tuple(
            Item(_text(fqn), _text(dtype), tuple(map(int, size)), tuple(map(int, offsets)), tuple(map(int, sizes)))
            for fqn, dtype, size, offsets, sizes in document["items"]
        )
        opaque = tuple(_text(fqn) for fqn in document["opaque"])
        paths = {
            fqn: tuple(key if isinstance(key, int) else _text(key) for key in path)
            for fqn, path in document["paths"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as err:
        raise ValueError(f"not a layout: {type(err).__name__}: {err!s:.200}") from err
    for item in items:
        if item.dtype not in ITEMSIZE_BYTES:
            raise ValueError(f"layout: {item.fqn!r} has the unknown dtype {item.dtype!r}")
        if not len(item.size) == len(item.offsets) == len(item.sizes):
            raise ValueError(f"layout: {item.fqn!r} has a chunk of another number of dimensions than its tensor")
        if any(o < 0 or n < 0 or o + n > s for s, o, n in zip(item.size, item.offsets, item.sizes, strict=True)):
            raise ValueError(
                f"layout: the chunk {item.offsets}+{item.sizes} of {item.fqn!r} does not fit into {item.size}"
            )
    return Layout(items, opaque, paths)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a text is expected")
    return value
