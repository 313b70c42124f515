"""
The metrics and the metadata that a script gives with a save, checked.

Called from: `Checkpointer.save`. A save never fails for them: what cannot be kept is left out, and an error in the log names it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from pillion.wire import remarks
from pillion.wire.remarks import Remarks

_log = logging.getLogger(__name__)


def checked(step: object, metrics: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None) -> Remarks:
    """
    Return the remarks of a save. Logs what they cannot hold.

    Args:
        step: the step of the save, for the log.
        metrics: name -> number. NumPy's numbers and tensors of one element are numbers; a tensor on a GPU is waited for.
        metadata: name -> JSON value.
    """
    if not metrics and not metadata:
        return Remarks()
    problems: list[str] = []
    kept = Remarks(metrics=_metrics(metrics or {}, problems), metadata=_metadata(metadata or {}, problems))
    if problems:
        _log.error("pillion: the save of step %s goes on without %s", step, "; without ".join(problems))
    return kept


def _metrics(metrics: object, problems: list[str]) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        problems.append(f"its metrics: a mapping of names to numbers is allowed, not a {type(metrics).__name__}")
        return {}
    kept: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not 0 < len(name) <= remarks.MAX_NAME_CHARS or not name.isprintable():
            problems.append(
                f"the metric {name!r:.80}: its name must be a printable text of 1 to {remarks.MAX_NAME_CHARS} characters"
            )
        elif len(kept) == remarks.MAX_METRICS:
            problems.append(f"the metric {name!r} and those behind it: {remarks.MAX_METRICS} are allowed")
            break
        elif (number := _number(value)) is None:
            problems.append(f"the metric {name!r}: it must be a number, not {value!r:.80}")
        else:
            kept[name] = number
    return kept


def _number(value: Any) -> float | None:
    if isinstance(value, str | bytes | None):
        return None
    try:
        return float(value)
    except Exception:  # a boundary: __float__ of the script's own class
        return None


def _metadata(metadata: object, problems: list[str]) -> dict[str, Any]:
    allowed = "a mapping of names to values of JSON"
    if not isinstance(metadata, Mapping):
        problems.append(f"its metadata: {allowed} is allowed, not a {type(metadata).__name__}")
        return {}
    kept: dict[str, Any] = {}
    left = remarks.MAX_METADATA_BYTES
    for name, value in metadata.items():
        try:
            if not isinstance(name, str):
                raise TypeError(f"its name must be a text, not {name!r:.80}")
            encoded = json.dumps({name: value}, allow_nan=False)
            encoded.encode()
        except (TypeError, ValueError, RecursionError) as err:
            problems.append(f"{name!r:.80} of the metadata: {allowed} is allowed ({err!s:.200})")
            continue
        left -= len(encoded)
        if left < 0:
            problems.append(
                f"{name!r:.80} of the metadata and what is behind it: {remarks.MAX_METADATA_BYTES} bytes are allowed"
            )
            break
        # A copy, which later changes of the script do not reach.
        kept |= json.loads(encoded)
    return kept
