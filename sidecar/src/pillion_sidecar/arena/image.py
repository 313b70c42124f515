"""
A sealed slot as the executor sees it: its layout, its opaque leaves, its image, and the digests of all of it.

Called from: `executor.save.persist`, `executor.load.restore`. Reads arena memory in place; writes only the archive heads and tails and the digests table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from pillion.wire import arena, layout
from pillion_sidecar.arena.segment import Segment
from pillion_sidecar.storage import archive, digest


class TornSlot(ValueError):
    """The slot does not hold what its header says: it was not sealed, or was damaged since."""


@dataclass(frozen=True)
class SlotImage:
    """One rank's sealed snapshot."""

    segment: Segment
    slot: int
    header: arena.SlotHeader
    layout: layout.Layout
    opaque_lengths: tuple[int, ...]
    opaque_starts: tuple[int, ...]

    @property
    def memory(self) -> memoryview:
        """The image: offset 0 is the first archive. Page-aligned."""
        return self.segment.slot(self.slot)[arena.PAGE_BYTES : arena.PAGE_BYTES + _pages(self.header.image_bytes)]

    def extents(self) -> Iterator[tuple[int, int]]:
        """(start, length) in the image of every archive: items, then opaque leaves."""
        slot_layout = self.layout
        for index, start in enumerate(slot_layout.starts):
            yield start, slot_layout.end(index) - start
        yield from zip(self.opaque_starts, self.opaque_lengths, strict=True)

    @property
    def num_leaves(self) -> int:
        return len(self.layout.items) + len(self.opaque_lengths)


def _pages(length: int) -> int:
    return -(-length // arena.PAGE_BYTES) * arena.PAGE_BYTES


class Reader:
    """Reads slots; remembers the last layouts, which rarely change."""

    KEPT_A_RANK: Final = 4
    """Layouts change rarely, and then go back and forth; as many are remembered as plans (`agreed.KEPT_PLANS`)."""

    def __init__(self, num_ranks: int = 1) -> None:
        self._kept = num_ranks * self.KEPT_A_RANK
        self._layouts: dict[bytes, layout.Layout] = {}

    def read(self, segment: Segment, slot: int, *, step: int | None = None) -> SlotImage:
        """
        The sealed snapshot of a slot.

        Raises:
            TornSlot: it is not sealed, is of another step, its layout or manifest do not match their digests or are none, or what it
                says of itself lies beyond what is allocated.
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
        manifest = bytes(memory[header.manifest_offset : header.manifest_offset + header.manifest_bytes])
        if hashlib.blake2b(manifest, digest_size=16).digest() != header.manifest_digest:
            raise TornSlot(f"slot {slot} of {segment.path}: the manifest does not match its digest")
        slot_layout = self._layout(segment, slot, header, memory)
        opaque_names, lengths = _manifest(segment, slot, manifest)
        if opaque_names != header.step:
            raise TornSlot(f"slot {slot} of {segment.path}: the header says step {header.step}, not {opaque_names}")
        starts, image_bytes = slot_layout.opaque_starts(lengths)
        if len(lengths) != len(slot_layout.opaque) or image_bytes != header.image_bytes:
            raise TornSlot(f"slot {slot} of {segment.path}: the image has another length than its layout")
        digests_end = header.digests_offset + (len(slot_layout.items) + len(lengths)) * arena.DIGEST_BYTES
        # The digests are written there: not into the header, and not into the image that they are of.
        too_early = header.digests_offset < arena.PAGE_BYTES + header.image_bytes
        if too_early or digests_end > segment.capacity_bytes(slot, enough_bytes=digests_end):
            raise TornSlot(f"slot {slot} of {segment.path}: there is no room for the digests")
        return SlotImage(segment, slot, header, slot_layout, lengths, starts)

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
    """Touching what was never allocated would take memory that nobody declared, or end this process with SIGBUS."""
    end = max(
        arena.PAGE_BYTES + _pages(header.image_bytes),
        header.layout_offset + header.layout_bytes,
        header.manifest_offset + header.manifest_bytes,
    )
    has = segment.capacity_bytes(slot, enough_bytes=end)
    if end > has:
        raise TornSlot(f"slot {slot} of {segment.path} has {has} bytes, and its header speaks of {end}")


def _manifest(segment: Segment, slot: int, text: bytes) -> tuple[object, tuple[int, ...]]:
    """The step that a slot's manifest names, and the lengths of the opaque leaves."""
    try:
        document = json.loads(text)
        step, lengths = document["step"], tuple(int(length) for length in document["opaque"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as err:
        raise TornSlot(f"slot {slot} of {segment.path}: its manifest is none: {type(err).__name__}") from err
    if min(lengths, default=0) < 0:
        raise TornSlot(f"slot {slot} of {segment.path}: an opaque leaf has a negative length")
    return step, lengths


def frame(image: SlotImage) -> SlotImage:
    """Write the archive heads and tails around the payloads, unless this slot has them already for this layout."""
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
    Digest every archive of a framed image, and leave the digests in the slot for whoever restores from it.

    Returns:
        Hex digests, items first, then opaque leaves.
    """
    memory = image.memory
    digests = []
    for index, (start, length) in enumerate(image.extents()):
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
    """The digests taken after this seal; None when the sidecar had no time to take them."""
    header = image.header
    if header.digests_for != header.sequence or header.digests_count != image.num_leaves:
        return None
    whole = image.segment.slot(image.slot)
    table = bytes(whole[header.digests_offset : header.digests_offset + header.digests_count * arena.DIGEST_BYTES])
    return [table[i : i + arena.DIGEST_BYTES].hex() for i in range(0, len(table), arena.DIGEST_BYTES)]


def _with(image: SlotImage, **changes: object) -> SlotImage:
    """Change fields of the slot's header, in the arena and in the image."""
    import dataclasses

    # Read again: the supervisor may have changed the state word or the flags since.
    header = dataclasses.replace(image.segment.read_header(image.slot), **changes)  # type: ignore[arg-type]
    image.segment.write_header(image.slot, header)
    return dataclasses.replace(image, header=header)
