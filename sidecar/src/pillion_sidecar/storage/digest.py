"""
The digest of stored bytes: one algorithm, one spelling.

This is the whole of how Pillion names the content of an item. The writer calls it on arena memory while the same bytes
go to the disk, the loader calls it on a filled slot before anyone trusts it, and the manifest stores what it returned.
It must never copy its input, and it is no protection against someone who wants to deceive: xxh3 finds accidents.

`xxhash` releases the GIL while it hashes a large buffer, so a digest runs beside reading and writing threads. Seen with
xxhash 4.1.0 (XXH 0.8.4) on CPython 3.11 and 2 cores: a thread that counts in Python keeps its full rate beside it
(16.2 M/s alone, 16.9 M/s beside digests of 256 MiB), and one thread hashes 20 GB/s, ten times what the disk takes.
Two threads do 18 to 28 GB/s together: memory is the limit then, so one digest thread is enough.
"""

from typing import Final

import xxhash

ALGORITHM: Final = "xxh3_128"
"""The name that stands next to every digest in a manifest; a reader refuses a name that it does not know."""


def digest(view: bytes | bytearray | memoryview) -> str:
    """
    The digest of all bytes of `view`: 32 lower-case hexadecimal digits, most significant first (the canonical form).

    The buffer may be read-only; it is not copied.

    Blocks: for about 0.05 s per GiB, with the GIL released.
    Raises: BufferError when the buffer is not contiguous.
    Source: XXH128_canonical_t, xxHash specification, doc/xxhash_spec.md.
    """
    return xxhash.xxh3_128_hexdigest(view)
