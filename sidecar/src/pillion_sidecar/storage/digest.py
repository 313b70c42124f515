"""
The digest of stored bytes: one algorithm, in one notation.

A digest identifies the content of an item. The writer computes it from arena memory while the same bytes go to the disk. The loader computes
it from a filled slot before the slot is used. The manifest stores the digest. This module must never copy its input. The digest finds
accidents (xxh3), and does not protect against an attacker.

`xxhash` releases the GIL while it hashes a large buffer, so a digest runs in parallel with threads that read and write. Seen with xxhash 4.1.0
(XXH 0.8.4) on CPython 3.11 and 2 cores: a thread that counts in Python keeps its full rate beside it (16.2 M/s alone, 16.9 M/s beside
digests of 256 MiB), and one thread hashes 20 GB/s, ten times the rate of the disk. Two threads do 18 to 28 GB/s together, as memory is then
the limit. So one digest thread is enough.
"""

from typing import Final, final

import xxhash

ALGORITHM: Final = "xxh3_128"
"""Name that is written next to every digest in a manifest. A reader refuses a name that it does not know."""


def digest(view: bytes | bytearray | memoryview) -> str:
    """
    Return the digest of all bytes of `view`: 32 lower-case hexadecimal digits, most significant first (the canonical form).

    The buffer may be read-only. It is not copied.

    Blocks: for about 0.05 s per GiB, with the GIL released.
    Raises: BufferError if the buffer is not contiguous.
    Source: XXH128_canonical_t, xxHash specification, doc/xxhash_spec.md.
    """
    return xxhash.xxh3_128_hexdigest(view)


@final
class Running:
    """The digest of bytes that come one stretch after the other."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, view: bytes | bytearray | memoryview) -> None:
        """Take the next stretch. Blocks: as `digest`."""
        self._state.update(view)

    def finish(self) -> str:
        """Return the digest of all stretches, and begin anew."""
        found = self._state.hexdigest()
        self._state.reset()
        return found
