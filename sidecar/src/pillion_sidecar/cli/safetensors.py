"""
The format safetensors, and the shards and index in which Hugging Face's tools look for it. Pure.

    8 bytes, little-endian: length of the header   JSON {name: {dtype, shape, data_offsets}}, padded with blanks   values without a gap

Called from: `cli.exporting`.
Source: the format's README (huggingface/safetensors, "Format"); `transformers`' loading of `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

DTYPES: Final[Mapping[str, str]] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
"""torch's names -> names of the format. Types that are missing here are missing there, or safetensors.torch does not load them."""
INDEX: Final = "model.safetensors.index.json"
METADATA: Final = {"format": "pt"}
"""`transformers` refuses a file without it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to write."""

    name: str
    dtype: str
    """torch's name."""
    shape: tuple[int, ...]
    item_bytes: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file."""

    file: str
    entries: tuple[Entry, ...]
    """In the order of their values: types of many bytes first, so that all values are aligned."""

    def starts(self) -> list[int]:
        """Return the offset of each entry's values behind the header."""
        starts, at = [], 0
        for each in self.entries:
            starts.append(at)
            at += each.num_bytes
        return starts

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.entries)


def shards(entries: Sequence[Entry], *, max_shard_bytes: int, stem: str = "model") -> list[Shard]:
    """
    Cut tensors into files, in the order of their names.

    Args:
        max_shard_bytes: size at which a file ends. A larger tensor is a file by itself.
    """
    groups: list[list[Entry]] = []
    size = 0
    for each in sorted(entries, key=lambda each: each.name):
        if not groups or (size and size + each.num_bytes > max_shard_bytes):
            groups.append([])
            size = 0
        groups[-1].append(each)
        size += each.num_bytes
    if len(groups) <= 1:
        return [Shard(f"{stem}.safetensors", _aligned(groups[0] if groups else []))]
    return [
        Shard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", _aligned(group))
        for number, group in enumerate(groups, 1)
    ]


def _aligned(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda each: (-each.item_bytes, each.name)))


def header(shard: Shard, metadata: Mapping[str, str]) -> bytes:
    """Return everything before the values. Its length is a multiple of 8."""
    document: dict[str, object] = {"__metadata__": {**METADATA, **metadata}}
    for each, start in zip(shard.entries, shard.starts(), strict=True):
        document[each.name] = {
            "dtype": DTYPES[each.dtype],
            "shape": list(each.shape),
            "data_offsets": [start, start + each.num_bytes],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(made: Sequence[Shard]) -> bytes:
    """Return the index of several files: which tensor is in which."""
    document = {
        "metadata": {"total_size": sum(shard.num_bytes for shard in made)},
        "weight_map": dict(sorted((e.name, shard.file) for shard in made for e in shard.entries)),
    }
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
