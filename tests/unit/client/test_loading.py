"""
The whole of: what the client does with the sidecar's answers to a load.

Called from: pytest.
"""

import io

import pytest

from pillion import loading
from pillion.errors import LoadError


class Drops(io.RawIOBase):
    """A file that gives seven bytes a call."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self.name = "drops"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._data.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed has a Buffer
        return self._data.readinto(memoryview(buffer)[:7])


def test_an_opaque_leaf_is_read_whole_however_little_one_call_gives() -> None:
    """One read gives at most 2 GiB less a page; an opaque leaf may be longer."""
    data = bytes(range(200))
    with io.BufferedReader(Drops(data), buffer_size=16) as file:
        assert loading._read_piece(file, 20, 150) == data[20:170]
        with pytest.raises(LoadError, match="drops end at 200"):
            loading._read_piece(file, 190, 20)
