"""
Registers a mapping with CUDA as page-locked memory, which a device reads and writes directly. No copy may cross a registration's edge.

Called from: `pillion.staging`.

- A copy to unregistered memory goes through the driver's own buffer, at a fraction of the rate, and blocks its caller.
- A copy that crosses from registered to unregistered memory, or between two registrations, fails.
- A registration outlives the mapping. If the memory is unmapped first, the device continues to write to pages of a removed file.

Source: CUDA Runtime API, Memory Management (cudaHostRegister, cudaHostUnregister; of cudaMemcpyAsync: "Memory regions requested must be
either entirely registered with CUDA, or in the case of host pageable transfers, not registered at all"), Error Handling (cudaGetLastError:
an error is the host thread's).
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from pillion import devices
from pillion.wire import arena
from pillion.wire import layout as layout_module

_log = logging.getLogger(__name__)

PIECE_BYTES: Final = 1024**3
"""Maximum bytes of a single registration. A call takes some 0.1 s a GiB, and a kernel launch of the training may wait for it. A call of
512 GiB or more fails on r580 drivers, with an error that stays."""
PORTABLE: Final = 1
"""Flag cudaHostRegisterPortable: page-locked for every device of the process, not only for the calling thread's."""


class Registration:
    """
    The registered pieces of one mapping.

    Args:
        address: start address of the mapping.

    Owns: its registrations, until `release`. Thread-safe. The caller ensures that no copy uses a slot during `extend`.
    """

    def __init__(self, address: int) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._pieces: dict[int, list[tuple[int, int]]] = defaultdict(list)
        """Start of a slot -> address and length of its contiguous pieces."""
        self._refused: set[int] = set()
        self._devices: Sequence[torch.device] = ()

    def extend(self, start: int, size_bytes: int, on_devices: Sequence[torch.device]) -> None:
        """
        Register the missing part of [start, start + size_bytes) of the mapping, in whole pages. `start` is the start of a slot.

        A failure is no error: copies are only slower.

        Blocks: some 0.1 s for each new GiB.
        """
        size_bytes -= size_bytes % arena.PAGE_BYTES
        with self._lock:
            have = sum(length for _, length in self._pieces[start])
            if have >= size_bytes or start in self._refused:
                return
            self._devices = on_devices
            if not self._apart(lambda: self._register(start, have, size_bytes)):
                self._refused.add(start)

    def _register(self, start: int, have: int, size_bytes: int) -> None:
        while have < size_bytes:
            address, length = self._address + start + have, min(PIECE_BYTES, size_bytes - have)
            error = int(torch.cuda.cudart().cudaHostRegister(address, length, PORTABLE))
            if error != 0:
                self._refused.add(start)
                _log.warning(
                    "pillion: CUDA could not page-lock %d bytes of the arena (error %d); copies from the GPU are slower",
                    length,
                    error,
                )
                return
            self._pieces[start].append((address, length))
            have += length

    def edges(self, start: int, size_bytes: int) -> list[int]:
        """Return the ascending offsets, from `start`, at which registered pieces begin or end within [start, start + size_bytes)."""
        with self._lock:
            ends = {
                edge for pieces in self._pieces.values() for address, n in pieces for edge in (address, address + n)
            }
        offsets = sorted(end - self._address - start for end in ends)
        return [offset for offset in offsets if 0 < offset < size_bytes]

    def release(self) -> None:
        """Unregister everything. The caller ensures that no copy runs, and that the memory is still mapped."""
        with self._lock:
            pieces = [piece for each in self._pieces.values() for piece in each]
            self._pieces.clear()
            if pieces and not self._apart(lambda: _unregister(pieces)):
                _unregister(pieces)

    def _apart(self, call: Callable[[], None]) -> bool:
        """
        Run driver calls in a thread of their own. False if no thread can start.

        A failing call leaves its error in its thread; in the trainer's thread, torch would raise it from the next kernel launch. The wait has
        no timeout, as for every driver call: half-registered memory can be neither used nor released.
        """

        def run() -> None:
            devices.use(self._devices)
            call()

        thread = threading.Thread(target=run, name="pillion-register", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a limit, or the interpreter's end
            return False
        thread.join()
        return True


def _unregister(pieces: Sequence[tuple[int, int]]) -> None:
    for address, _ in pieces:
        # It fails only if CUDA has shut down first, at the end of the process.
        torch.cuda.cudart().cudaHostUnregister(address)


def cuts(layout: layout_module.Layout, edges: Sequence[int]) -> Mapping[int, tuple[int, ...]]:
    """
    Return the offsets at which copies must be split. Pure.

    Args:
        layout: the layout of the slot.
        edges: offsets in a slot's image, ascending. They are multiples of a page, and payloads begin at multiples of 64 bytes. So a cut
            always lies between two elements, for any dtype.

    Returns:
        Index of an item -> offsets in its payload, bytes. Items without an edge are left out.
    """
    offsets_by_item: dict[int, list[int]] = defaultdict(list)
    for edge in edges:
        index = bisect.bisect_right(layout.payload_starts, edge) - 1
        if index >= 0 and 0 < (offset := edge - layout.payload_starts[index]) < layout.items[index].payload_bytes:
            offsets_by_item[index].append(offset)
    return {index: tuple(offsets) for index, offsets in offsets_by_item.items()}
