"""
When the executor collects garbage: as DCP's own process that saves, by the same two variables.

Called from: `worker`. By default Python collects when it likes. Under DCP_DISABLE_AUTOMATIC_GC=1 it does not: one collection comes behind
each save, when nobody waits for this process, and none under DCP_DISABLE_MANUAL_GC=1. What there is behind the first save (modules, kept
plans) is left out of later collections.

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
    Of this process.

    Args:
        environ: exactly "1" switches off, as in DCP.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        automatic = environ.get(AUTOMATIC_OFF) != "1"
        self._collects = not automatic and environ.get(MANUAL_OFF) != "1"
        self._frozen = False
        if not automatic:
            gc.disable()

    def saved(self) -> None:
        """A save has ended, and its outcome is told. Blocks: for a collection, 0.2 s with torch imported."""
        if not self._collects:
            return
        gc.collect()
        if not self._frozen:
            self._frozen = True
            gc.freeze()
