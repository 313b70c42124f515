"""
Verifying a snapshot between the death of its trainers and the load of their successors, so that the load has only to copy.

Called from: `executor.worker` (verifies), `executor.load.snapshot` (asks what is verified). Nobody writes to a snapshot in that time: its trainers are gone,
and their successors load before they save. The first save or load of the executor ends what is known, as a living trainer has the arena mapped.
Must never: keep a request waiting for more than one item of each rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from typing import Final

from pillion_sidecar.arena import image
from pillion_sidecar.storage import digest

TRUSTED_S: Final = 600.0
"""Maximum age of a verification that a load relies on: a restart with a slow import, or after some of a kubelet's pauses. Memory errors within it are
rarer than those while the same bytes are copied and trained on for days."""

Seal = tuple[str, int, int, int]
"""Path of the segment, slot, and of its header the sequence and the time of the seal: other trainers' seals have others."""


@dataclass(slots=True)
class Checked:
    """How many archives of which seals matched their digests. One instance lives as long as the executor, over its sessions."""

    _counts: dict[Seal, int] = field(default_factory=dict)
    _ended: float = 0.0
    """When the last verification ended, by the monotonic clock."""

    def verify(self, images: list[image.SlotImage], *, interrupted: Callable[[], bool]) -> bool:
        """
        Compare the archives of these snapshots with their digests, in their order. What is known of other seals is forgotten.

        A snapshot without digests counts as not verified, and so does everything from the first archive on that does not match: the load says which.

        Args:
            images: the newest snapshot of each local rank.
            interrupted: whether to end early. Called before each archive.

        Returns:
            Whether every archive of every snapshot matched.

        Blocks: for as long as the digests take, about 0.1 s a GiB and processor.
        """
        self.forget()
        with futures.ThreadPoolExecutor(max(1, min(len(images), os.cpu_count() or 1)), "pillion-check") as pool:
            for each, count in zip(images, pool.map(lambda each: _matching(each, interrupted), images), strict=True):
                self._counts[_seal(each)] = count
        self._ended = time.monotonic()
        return all(self.count(each) == each.num_leaves and image.known_digests(each) is not None for each in images)

    def count(self, slot_image: image.SlotImage) -> int:
        """Return how many of the snapshot's archives are verified: the first ones, in the order of `image.extents`."""
        return self._counts.get(_seal(slot_image), 0) if time.monotonic() - self._ended < TRUSTED_S else 0

    def forget(self) -> None:
        """Trust no snapshot any more."""
        self._counts.clear()


def _seal(slot_image: image.SlotImage) -> Seal:
    header = slot_image.header
    return (slot_image.segment.path, slot_image.slot, header.sequence, header.sealed_ns)


def _matching(slot_image: image.SlotImage, interrupted: Callable[[], bool]) -> int:
    """Return how many archives match, until the first one that does not."""
    digests = image.known_digests(slot_image)
    if digests is None:
        return 0
    memory = slot_image.memory
    for index, (start, length) in enumerate(image.extents(slot_image)):
        if interrupted() or digest.digest(memory[start : start + length]) != digests[index]:
            return index
    return len(digests)
