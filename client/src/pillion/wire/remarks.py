"""
What a training script says about a save: numbers that judge it (`metrics`), and anything else in JSON (`metadata`). Pure.

Producer: the client, with the save, into the trailer of the slot. Consumer: the sidecar, which passes it on to parts, manifest and reports.
So a save that is committed after its trainer died still has it.

JSON has no number for infinity and NaN, so such a metric is a text: ``nan``, ``inf``, ``-inf``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MAX_METRICS: Final = 64
"""Maximum metrics of a save."""
MAX_NAME_CHARS: Final = 128
"""Maximum length of a metric's name, characters."""
MAX_METADATA_BYTES: Final = 65_536
"""Maximum length of the metadata as JSON, bytes. It is in the manifest, which every listing of a root reads."""
_SPECIAL: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class Remarks:
    """See the module."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Values of JSON."""

    @property
    def metrics_document(self) -> dict[str, Any]:
        """The metrics as values of JSON."""
        return {name: value if math.isfinite(value) else str(value) for name, value in self.metrics.items()}

    def to_document(self) -> dict[str, Any]:
        """Return the fields that are not empty, as JSON values."""
        fields = {"metrics": self.metrics_document, "metadata": dict(self.metadata)}
        return {name: value for name, value in fields.items() if value}

    def encoded_bytes(self) -> int:
        """Return the length of the document as JSON, bytes."""
        return len(json.dumps(self.to_document(), separators=(",", ":")).encode())


NO_REMARKS: Final = Remarks()
"""The remarks of a save of which nobody says anything."""


def read(document: Mapping[str, Any]) -> Remarks:
    """
    Read the remarks in a JSON object, which may have other fields. A metric that is no number is left out.

    Remarks are for people and for retention. So damage in them, or a later release's kind of metric, does not make a checkpoint unreadable.
    """
    metrics, metadata = document.get("metrics"), document.get("metadata")
    read_metrics = {}
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        if isinstance(value, str) and value in _SPECIAL:
            read_metrics[str(name)] = _SPECIAL[value]
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e308 * 1.7:
            read_metrics[str(name)] = float(value)
    return Remarks(metrics=read_metrics, metadata=dict(metadata) if isinstance(metadata, Mapping) else {})
