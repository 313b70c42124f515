"""
A sealed slot as the executor reads it: its layout, its opaque leaves, its image, and their digests.

Called from: `executor.save.persist`, `executor.load.restore`. Reads arena memory in place. Writes only the heads and tails of the archives, and
the table of digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from pillion.wire import arena, layout, remarks
from pillion.wire.remarks import Remarks
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.storage import archive, digest


class TornSlot(ValueError):
    """The content of the slot does not match its header. It was not sealed, or was damaged later."""


class Image(Protocol):
    """One rank's state, as a save writes it: a sealed slot, or a local copy of one (`copies.disk`)."""

    @property
    def layout(self) -> layout.Layout: ...

    @property
    def opaque_lengths(self) -> tuple[int, ...]:
        """Length of each opaque leaf, bytes."""

    @property
    def opaque_starts(self) -> tuple[int, ...]:
        """Offset of each opaque leaf in the image, bytes."""

    @property
    def memory(self) -> memoryview:
        """The image, in whole pages. The first archive begins at offset 0."""

    @property
    def remarks(self) -> Remarks:
        """What the script said about the save."""

    def framed(self) -> Image:
        """Return the image with the heads and tails of its archives."""

    def digested(self) -> list[str]:
        """Return the digest of every archive of a framed image: first the items, then the opaque leaves."""


def extents(rank_image: Image) -> Iterator[tuple[int, int]]:
    """Yield the start and length, bytes, of every archive in the image: first the items, then the opaque leaves."""
    slot_layout = rank_image.layout
    for index, start in enumerate(slot_layout.starts):
        yield start, slot_layout.end(index) - start
    yield from zip(rank_image.opaque_starts, rank_image.opaque_lengths, strict=True)


@dataclass(frozen=True)
class SlotImage:
    """One rank's sealed snapshot, as an `Image`."""

    segment: Segment
    slot: int
    header: arena.SlotHeader
    layout: layout.Layout
    opaque_lengths: tuple[int, ...]
    opaque_starts: tuple[int, ...]
    remarks: Remarks = field(default_factory=Remarks)
    """What the script said about the save on this rank."""

    @property
    def memory(self) -> memoryview:
        """The image, in whole pages. The first archive begins at offset 0."""
        return self.segment.slot(self.slot)[arena.PAGE_BYTES : arena.PAGE_BYTES + _pages(self.header.image_bytes)]

    def framed(self) -> SlotImage:
        return frame(self)

    def digested(self) -> list[str]:
        return digest_all(self)

    @property
    def num_leaves(self) -> int:
        return len(self.layout.items) + len(self.opaque_lengths)


def _pages(length: int) -> int:
    return -(-length // arena.PAGE_BYTES) * arena.PAGE_BYTES


class Reader:
    """Reads sealed slots. It keeps the last decoded layouts, because layouts rarely change."""

    KEPT_A_RANK: Final = 4
    """Layouts that are kept for each rank. They rarely change, and then alternate. As many plans are kept (`agreements.KEPT_PLANS`)."""

    def __init__(self, num_ranks: int = 1) -> None:
        self._kept = num_ranks * self.KEPT_A_RANK
        self._layouts: dict[bytes, layout.Layout] = {}

    def read(self, segment: Segment, slot: int, *, step: int | None = None) -> SlotImage:
        """
        Return the sealed snapshot of a slot.

        Raises:
            TornSlot: the slot is not sealed or has another step; layout or trailer are malformed, or do not match their digests; or an
                extent in the header is not allocated.
        """
        try:
            header = segment.read_header(slot)
        except ValueError as err:
            raise TornSlot(f"slot {slot} of {segment.path}: {err}") from err
        if header.state not in (arena.SlotState.SEALED, arena.SlotState.PERSISTING):
            raise TornSlot(f"slot {slot} of {segment.path} is {header.state.name.lower()}, not sealed")
        if step is not None and header.step != step:
            raise TornSlot(f"slot {slot} of {segment.path} holds step {header.step}, not {step}")
        _check_extents(segment, slot, header)
        memory = segment.slot(slot)
        trailer = bytes(memory[header.trailer_offset : header.trailer_offset + header.trailer_bytes])
        if hashlib.blake2b(trailer, digest_size=16).digest() != header.trailer_digest:
            raise TornSlot(f"slot {slot} of {segment.path}: the trailer does not match its digest")
        slot_layout = self._layout(segment, slot, header, memory)
        trailer_step, lengths, said = _decode_trailer(segment, slot, trailer)
        if trailer_step != header.step:
            raise TornSlot(f"slot {slot} of {segment.path}: the header says step {header.step}, not {trailer_step}")
        starts, image_bytes = slot_layout.opaque_starts(lengths)
        if len(lengths) != len(slot_layout.opaque) or image_bytes != header.image_bytes:
            raise TornSlot(f"slot {slot} of {segment.path}: the image has another length than its layout")
        digests_end = header.digests_offset + (len(slot_layout.items) + len(lengths)) * arena.DIGEST_BYTES
        # The digests will be written there, so their place may overlap neither header nor image.
        too_early = header.digests_offset < arena.PAGE_BYTES + header.image_bytes
        if too_early or digests_end > segment.capacity_bytes(slot, enough_bytes=digests_end):
            raise TornSlot(f"slot {slot} of {segment.path}: there is no room for the digests")
        return SlotImage(segment, slot, header, slot_layout, lengths, starts, said)

    def _layout(self, segment: Segment, slot: int, header: arena.SlotHeader, memory: memoryview) -> layout.Layout:
        cached = self._layouts.get(header.layout_digest)
        if cached is not None:
            return cached
        encoded = bytes(memory[header.layout_offset : header.layout_offset + header.layout_bytes])
        if hashlib.blake2b(encoded, digest_size=16).digest() != header.layout_digest:
            raise TornSlot(f"slot {slot} of {segment.path}: the layout does not match its digest")
        try:
            slot_layout = layout.decode(encoded)
        except ValueError as err:
            raise TornSlot(f"slot {slot} of {segment.path}: {err}") from err
        self._layouts[header.layout_digest] = slot_layout
        while len(self._layouts) > self._kept:
            del self._layouts[next(iter(self._layouts))]
        return slot_layout


def _check_extents(segment: Segment, slot: int, header: arena.SlotHeader) -> None:
    """
    Check that the extents of a slot are allocated. A touch of other pages would take undeclared memory, or end this process with SIGBUS.

    Raises:
        TornSlot: an extent is not allocated.
    """
    end = max(
        arena.PAGE_BYTES + _pages(header.image_bytes),
        header.layout_offset + header.layout_bytes,
        header.trailer_offset + header.trailer_bytes,
    )
    has = segment.capacity_bytes(slot, enough_bytes=end)
    if end > has:
        raise TornSlot(f"slot {slot} of {segment.path} has {has} bytes, and its header speaks of {end}")


def _decode_trailer(segment: Segment, slot: int, text: bytes) -> tuple[object, tuple[int, ...], Remarks]:
    """Return the step in a slot's trailer, the lengths of the opaque leaves in bytes, and the remarks."""
    try:
        document = json.loads(text)
        step, lengths = document["step"], tuple(int(length) for length in document["opaque"])
        said = remarks.read(document)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as err:
        raise TornSlot(f"slot {slot} of {segment.path}: its trailer is malformed: {type(err).__name__}") from err
    if min(lengths, default=0) < 0:
        raise TornSlot(f"slot {slot} of {segment.path}: an opaque leaf has a negative length")
    return step, lengths, said


def frame(image: SlotImage) -> SlotImage:
    """Write the heads and tails of the archives around the payloads, unless the slot already has them for this layout."""
    header = image.header
    if header.framed_digest == header.layout_digest:
        return image
    memory = image.memory
    slot_layout = image.layout
    for index, item in enumerate(slot_layout.items):
        start, end = slot_layout.starts[index], slot_layout.end(index)
        memory[start : start + layout.HEAD_BYTES] = archive.head(item.dtype, item.sizes, item.payload_bytes)
        padding = start + layout.HEAD_BYTES + item.payload_bytes
        tail = end - layout.TAIL_BYTES
        memory[padding:tail] = bytes(tail - padding)
        memory[tail:end] = archive.tail(item.dtype, item.sizes, item.payload_bytes)
    return _with(image, framed_digest=header.layout_digest)


def digest_all(image: SlotImage, on_item: Callable[[int, str], None] | None = None) -> list[str]:
    """
    Compute the digest of every archive in a framed image, and write the digests into the slot for a later restore.

    Args:
        image: the image, with heads and tails.
        on_item: called with the index and the digest of each archive.

    Returns:
        The digests as hex text: first the items, then the opaque leaves.
    """
    memory = image.memory
    digests = []
    for index, (start, length) in enumerate(extents(image)):
        digests.append(digest.digest(memory[start : start + length]))
        if on_item is not None:
            on_item(index, digests[-1])
    table = bytes.fromhex("".join(digests))
    offset = image.header.digests_offset
    whole = image.segment.slot(image.slot)
    whole[offset : offset + len(table)] = table
    _with(image, digests_count=len(digests), digests_for=image.header.sequence)
    return digests


def known_digests(image: SlotImage) -> list[str] | None:
    """Return the digests that were computed after this seal. None if the sidecar has not computed them."""
    header = image.header
    if header.digests_for != header.sequence or header.digests_count != image.num_leaves:
        return None
    whole = image.segment.slot(image.slot)
    table = bytes(whole[header.digests_offset : header.digests_offset + header.digests_count * arena.DIGEST_BYTES])
    return [table[i : i + arena.DIGEST_BYTES].hex() for i in range(0, len(table), arena.DIGEST_BYTES)]


def _with(image: SlotImage, **changes: object) -> SlotImage:
    """Change fields of the slot's header in the arena. Return the image with the new header."""
    import dataclasses

    # The header is read again, because the supervisor may have changed the state word or the flags.
    header = dataclasses.replace(image.segment.read_header(image.slot), **changes)  # type: ignore[arg-type]
    image.segment.write_header(image.slot, header)
    return dataclasses.replace(image, header=header)
