"""
Controls the garbage collection of the executor, by the same two variables as DCP's own process for saves.

Called from: `worker`. By default Python collects automatically. With DCP_DISABLE_AUTOMATIC_GC=1, it collects once after each save, when nobody
waits for this process; with DCP_DISABLE_MANUAL_GC=1 as well, it never collects. Objects that exist after the first save (modules, kept plans)
are excluded from later collections.

Source: torch 2.15, torch/distributed/checkpoint/_async_process_executor.py.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Final

AUTOMATIC_OFF: Final = "DCP_DISABLE_AUTOMATIC_GC"
MANUAL_OFF: Final = "DCP_DISABLE_MANUAL_GC"


class Garbage:
    """
    The garbage collection of this process.

    Args:
        environ: the environment. Exactly "1" switches off, as in DCP.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        automatic = environ.get(AUTOMATIC_OFF) != "1"
        self._collects = not automatic and environ.get(MANUAL_OFF) != "1"
        self._frozen = False
        if not automatic:
            gc.disable()

    def saved(self) -> None:
        """Collect after a save whose outcome was sent, if that is enabled. Blocks: for a collection, 0.2 s with torch imported."""
        if not self._collects:
            return
        gc.collect()
        if not self._frozen:
            self._frozen = True
            gc.freeze()
