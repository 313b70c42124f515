"""The digest: its spelling is part of the format on storage, so it is checked against published values."""

import mmap

import pytest

from pillion_sidecar.storage import digest


def test_the_digest_of_nothing_is_the_published_one() -> None:
    """The spelling is the canonical one of xxHash, most significant digit first: other tools can check our files."""
    assert digest.digest(b"") == "99aa06d3014798d86001c324468d497f"


def test_memory_of_any_kind_with_the_same_bytes_has_the_same_digest() -> None:
    """What is in the arena, in a read-only view of it, and in bytes is one content with one digest."""
    content = bytes(range(256)) * 1024
    with mmap.mmap(-1, len(content)) as mapping:
        mapping[:] = content
        with memoryview(mapping) as view, view.toreadonly() as readonly:
            assert digest.digest(view) == digest.digest(readonly) == digest.digest(content)
            assert digest.digest(view[1:]) == digest.digest(content[1:]) != digest.digest(content)


def test_a_view_with_gaps_is_refused() -> None:
    """A digest never covers other bytes than the caller sees."""
    with pytest.raises(BufferError):
        digest.digest(memoryview(b"abcdef")[::2])
