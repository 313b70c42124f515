"""
Documents of a commit that say which generation wrote them.

Called from: tests of folders.
Must never: be mistaken for a real manifest.
"""

import json
from typing import Final

from pillion.wire import names
from pillion_sidecar.storage.folder import Document

PUBLISHED: Final = (names.MANIFEST, names.COMMIT_MARKER)


def documents(generation: str) -> list[Document]:
    """
    Both documents of a save.
    """
    return [Document(name, json.dumps({"generation": generation, "name": name}).encode()) for name in PUBLISHED]


def generation_of(data: bytes) -> str | None:
    """
    The generation in a document; None for what is none of these.
    """
    try:
        return str(json.loads(data)["generation"])
    except (ValueError, KeyError, TypeError):
        return None
