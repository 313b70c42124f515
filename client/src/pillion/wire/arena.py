"""
The arena's byte layout: the offsets in a segment file, and which side writes which bytes.

Producer: the sidecar creates segments and grants slots; the trainer fills and seals them. Consumer: both, and a restarted sidecar or
trainer, which finds out from these bytes alone which slots are complete.

A segment is one file per local rank on a tmpfs. It is sparse: every slot has the same address range (`stride_bytes`), and only bytes that
the sidecar has allocated with `posix_fallocate` take memory. So a slot grows in place, no slot moves, and both sides keep one mapping.

    segment: [segment header, one page][slot 0][slot 1]...          slot i begins at PAGE_BYTES + i * stride_bytes
    slot:    [slot header, one page][image][layout][trailer][digests]   all offsets below are from the slot's beginning

The trailer is a JSON object: the step, the lengths of the opaque leaves, which change from save to save, and the remarks (`wire.remarks`).

Segment header (little-endian):

    | offset | size | field        | type | meaning                                     | written by |
    |--------|------|--------------|------|---------------------------------------------|------------|
    | 0      | 8    | magic        | 8s   | b"PILLARN1"                                 | sidecar    |
    | 8      | 4    | version      | u32  | wire.PROTOCOL_VERSION                       | sidecar    |
    | 12     | 4    | num_slots    | u32  |                                             | sidecar    |
    | 16     | 8    | stride_bytes | u64  | address range of a slot, a multiple of PAGE | sidecar    |

Slot header (little-endian):

    | offset | size | field           | type | meaning                                                 | written by |
    |--------|------|-----------------|------|---------------------------------------------------------|------------|
    | 0      | 8    | magic           | 8s   | b"PILLSLT1"                                             | sidecar    |
    | 8      | 4    | state           | u32  | SlotState; the last word written at a seal              | see below  |
    | 12     | 4    | flags           | u32  | Flag bits                                               | sidecar    |
    | 16     | 8    | sequence        | u64  | counts the claims of this slot: a torn fill never fits  | sidecar    |
    | 24     | 8    | step            | i64  | training step                                           | trainer    |
    | 32     | 4    | rank            | u32  | global rank                                             | trainer    |
    | 36     | 4    | world_size      | u32  |                                                         | trainer    |
    | 40     | 8    | image_bytes     | u64  | length of the image, tensors and opaque leaves          | trainer    |
    | 48     | 8    | layout_offset   | u64  |                                                         | trainer    |
    | 56     | 8    | layout_bytes    | u64  |                                                         | trainer    |
    | 64     | 8    | trailer_offset  | u64  |                                                         | trainer    |
    | 72     | 8    | trailer_bytes   | u64  |                                                         | trainer    |
    | 80     | 8    | sealed_ns       | u64  | since the boot; orders the snapshots of an arena        | trainer    |
    | 88     | 16   | layout_digest   | 16s  | blake2b-128 of the layout bytes                         | trainer    |
    | 104    | 16   | trailer_digest  | 16s  | blake2b-128 of the trailer bytes                        | trainer    |
    | 120    | 16   | session         | 16s  | the session that sealed it                              | trainer    |
    | 136    | 16   | framed_digest   | 16s  | layout whose archive heads and tails are in the image   | sidecar    |
    | 152    | 8    | digests_offset  | u64  |                                                         | sidecar    |
    | 160    | 8    | digests_count   | u64  | items and opaque leaves digested                        | sidecar    |
    | 168    | 8    | digests_for     | u64  | the sequence these digests belong to; 0: none           | sidecar    |
    | 176    | 8    | generation      | u64  | of the session that filled it; 0: not known yet         | sidecar    |
    | 184    | 4    | epoch           | u32  | loads of that session before it; orders with the above  | sidecar    |

State words: the sidecar writes FREE and FILLING (at a claim), the trainer SEALED, the sidecar PERSISTING and SEALED again (with
Flag.PERSISTED). The trainer writes the header fields first, and the state word last. It is one aligned 4-byte store, which is atomic on x86
and arm64. The seal message through the socket orders it for the sidecar. If a restarted side finds a slot FILLING, the slot is torn, and is
freed.

Breaking: changing an offset. Not breaking: a field in the unused rest of a header page, a new flag bit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from pillion import wire

PAGE_BYTES: Final = 4096
SEGMENT_MAGIC: Final = b"PILLARN1"
SLOT_MAGIC: Final = b"PILLSLT1"
DIGEST_BYTES: Final = 16
"""Length of one digest (xxh3_128) in the digests table."""

SEGMENT_FORMAT: Final = struct.Struct("<8sIIQ")
SLOT_FORMAT: Final = struct.Struct("<8sIIQqIIQQQQQQ16s16s16s16sQQQQI")
STATE_OFFSET: Final = 8
_STATE: Final = struct.Struct("<I")


class SlotState(IntEnum):
    """State word of a slot."""

    FREE = 0
    FILLING = 1
    SEALED = 2
    PERSISTING = 3


class Flag(IntFlag):
    """Facts about a sealed slot."""

    NONE = 0
    PERSISTED = 1
    """Its checkpoint is committed on storage."""
    SNAPSHOT = 2
    """The save is for memory only: neither the policy nor the caller requested storage."""
    CONCLUDED = 4
    """The pods of the job have agreed on the save's outcome. Without this flag, peers of the session wait for this pod's part."""
    SET_ASIDE = 8
    """A load of an older step has set it aside. Only a load by number takes it. It is persisted only if the write had begun before."""


KNOWN_FLAGS = Flag.PERSISTED | Flag.SNAPSHOT | Flag.CONCLUDED | Flag.SET_ASIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    num_slots: int
    stride_bytes: int
    version: int = wire.PROTOCOL_VERSION

    def pack(self) -> bytes:
        return SEGMENT_FORMAT.pack(SEGMENT_MAGIC, self.version, self.num_slots, self.stride_bytes)

    @classmethod
    def unpack(cls, page: bytes | memoryview) -> SegmentHeader:
        """
        Read a segment's first page.

        Raises:
            ValueError: not a segment of Pillion, or an invalid geometry.
        """
        if len(page) < SEGMENT_FORMAT.size:
            raise ValueError(f"a segment header needs {SEGMENT_FORMAT.size} bytes, got {len(page)}")
        magic, version, num_slots, stride_bytes = SEGMENT_FORMAT.unpack_from(page)
        if magic != SEGMENT_MAGIC:
            raise ValueError(f"not an arena segment: magic {magic!r}")
        if num_slots < 1 or stride_bytes < 2 * PAGE_BYTES or stride_bytes % PAGE_BYTES:
            raise ValueError(f"not a valid segment: {num_slots} slots of {stride_bytes} bytes")
        return cls(num_slots=num_slots, stride_bytes=stride_bytes, version=version)

    def slot_offset(self, index: int) -> int:
        return PAGE_BYTES + index * self.stride_bytes

    @property
    def segment_bytes(self) -> int:
        return PAGE_BYTES + self.num_slots * self.stride_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHeader:
    """A slot's header page. See the table in the module's docstring."""

    state: SlotState
    flags: Flag = Flag.NONE
    sequence: int = 0
    step: int = -1
    rank: int = 0
    world_size: int = 0
    image_bytes: int = 0
    layout_offset: int = 0
    layout_bytes: int = 0
    trailer_offset: int = 0
    trailer_bytes: int = 0
    sealed_ns: int = 0
    layout_digest: bytes = bytes(16)
    trailer_digest: bytes = bytes(16)
    session: bytes = bytes(16)
    framed_digest: bytes = bytes(16)
    digests_offset: int = 0
    digests_count: int = 0
    digests_for: int = 0
    generation: int = 0
    epoch: int = 0

    def pack(self) -> bytes:
        return SLOT_FORMAT.pack(
            SLOT_MAGIC,
            self.state,
            self.flags,
            self.sequence,
            self.step,
            self.rank,
            self.world_size,
            self.image_bytes,
            self.layout_offset,
            self.layout_bytes,
            self.trailer_offset,
            self.trailer_bytes,
            self.sealed_ns,
            self.layout_digest,
            self.trailer_digest,
            self.session,
            self.framed_digest,
            self.digests_offset,
            self.digests_count,
            self.digests_for,
            self.generation,
            self.epoch,
        )

    @classmethod
    def unpack(cls, page: bytes | memoryview, *, stride_bytes: int) -> SlotHeader:
        """
        Read a slot's first page, and check that every extent in it lies within the slot.

        Raises:
            ValueError: not a slot of Pillion, an unknown state, or an extent outside the slot.
        """
        if len(page) < SLOT_FORMAT.size:
            raise ValueError(f"a slot header needs {SLOT_FORMAT.size} bytes, got {len(page)}")
        magic, state, flags, *fields = SLOT_FORMAT.unpack_from(page)
        if magic != SLOT_MAGIC:
            raise ValueError(f"not a slot: magic {magic!r}")
        names = (
            "sequence", "step", "rank", "world_size", "image_bytes", "layout_offset", "layout_bytes", "trailer_offset",
            "trailer_bytes", "sealed_ns", "layout_digest", "trailer_digest", "session", "framed_digest",
            "digests_offset", "digests_count", "digests_for", "generation", "epoch",
        )  # fmt: skip
        header = cls(state=SlotState(state), flags=Flag(flags & KNOWN_FLAGS), **dict(zip(names, fields, strict=True)))
        for what, offset, length in (
            ("image", PAGE_BYTES, header.image_bytes),
            ("layout", header.layout_offset, header.layout_bytes),
            ("trailer", header.trailer_offset, header.trailer_bytes),
            ("digests", header.digests_offset, header.digests_count * DIGEST_BYTES),
        ):
            if offset + length > stride_bytes:
                raise ValueError(f"the {what} at {offset}+{length} does not fit into a slot of {stride_bytes} bytes")
        return header


def pack_state(state: SlotState) -> bytes:
    """Return the state word alone, for the bytes at STATE_OFFSET."""
    return _STATE.pack(state)


def room_bytes(image_bytes: int, layout_bytes: int, trailer_bytes: int, num_leaves: int) -> int:
    """Return the bytes that a slot needs for a snapshot: header, image, layout, trailer and digests, in whole pages."""
    total = PAGE_BYTES + image_bytes + layout_bytes + trailer_bytes + num_leaves * DIGEST_BYTES + 4 * 64
    return -(-total // PAGE_BYTES) * PAGE_BYTES
