"""
What of a mapping CUDA knows: page-locked memory, which a device reaches by itself, and whose edges no copy may cross.

Called from: `pillion.staging`.

- A copy to memory that is not registered goes through the driver's own buffer, at a fraction of the rate, and holds its caller.
- A copy that lies in both kinds of memory, or in two registrations, fails: CUDA wants one of them under all of it.
- A registration outlives the mapping: where it is unmapped first, the device goes on writing to pages of a file that is gone.

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
"""Longest single registration. A call takes some 0.1 s a GiB, and training that launches a kernel may wait for it. One call of 512 GiB or
more fails on r580 drivers, with an error that stays."""
PORTABLE: Final = 1
"""cudaHostRegisterPortable: page-locked for every device of the process, and not only for that of the thread that asks."""


class Registration:
    """
    The registered pieces of one mapping.

    Args:
        address: where the mapping begins.

    Owns: what it has registered, until `release`. Thread-safe. That nobody copies to a slot while it is extended is its user's to see to.
    """

    def __init__(self, address: int) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._pieces: dict[int, list[tuple[int, int]]] = defaultdict(list)
        """By where a slot begins: address and length, one piece behind the other."""
        self._refused: set[int] = set()
        self._devices: Sequence[torch.device] = ()

    def extend(self, start: int, size_bytes: int, on_devices: Sequence[torch.device]) -> None:
        """
        Register [start, start + size_bytes) of the mapping, as far as it is not yet, in whole pages. `start` is that of a slot.

        Failing is no error: copies are slower then.

        Blocks: some 0.1 s a GiB that is new.
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
        """Where within [start, start + size_bytes) of the mapping a registered piece begins or ends; offsets from `start`, ascending."""
        with self._lock:
            ends = {
                edge for pieces in self._pieces.values() for address, n in pieces for edge in (address, address + n)
            }
        offsets = sorted(end - self._address - start for end in ends)
        return [offset for offset in offsets if 0 < offset < size_bytes]

    def release(self) -> None:
        """Unregister all of it. That nobody copies there any more, and that it is still mapped, is its user's to see to."""
        with self._lock:
            pieces = [piece for each in self._pieces.values() for piece in each]
            self._pieces.clear()
            if pieces and not self._apart(lambda: _unregister(pieces)):
                _unregister(pieces)

    def _apart(self, call: Callable[[], None]) -> bool:
        """
        Run calls of the driver in a thread that does nothing else; False where there can be none.

        One that fails leaves its error with the thread, and torch would raise it from whatever the trainer launches next. It is waited for
        without a bound, as every call of the driver is: memory that may be half registered can be neither copied to nor left.
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
        # One that fails says that CUDA has ended before us, with the process.
        torch.cuda.cudart().cudaHostUnregister(address)


def cuts(layout: layout_module.Layout, edges: Sequence[int]) -> Mapping[int, tuple[int, ...]]:
    """
    Where copies have to end. Pure.

    Args:
        edges: offsets in a slot's image, ascending. They are multiples of a page, and payloads begin at multiples of 64 bytes: a cut lies
            between two elements of any dtype.

    Returns:
        Index of an item -> offsets in its payload, bytes. What lies between two edges is not in it.
    """
    offsets_by_item: dict[int, list[int]] = defaultdict(list)
    for edge in edges:
        index = bisect.bisect_right(layout.payload_starts, edge) - 1
        if index >= 0 and 0 < (offset := edge - layout.payload_starts[index]) < layout.items[index].payload_bytes:
            offsets_by_item[index].append(offset)
    return {index: tuple(offsets) for index, offsets in offsets_by_item.items()}
