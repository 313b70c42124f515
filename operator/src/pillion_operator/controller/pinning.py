"""
Pins by annotation: which steps of a job its sidecar shall pin, and which ones it shall let go. Pure.

    kubectl annotate checkpoint NAME pillion.dev/pin=true
      -> PIN in the answers to the job's reports -> a pin of the holder "cluster" on storage -> `pinned_by` in the reports -> the object's status

The pin on storage is what counts. So an object that is made again for a pinned step gets the annotation again, and a step without an object
keeps its pin.

Called from: `report_handler`, `mirror`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from pillion.wire import home
from pillion_operator.controller.checkpoints import TRUE, Checkpoint

MAX_PINS: Final = 64
"""Maximum changes of pins in one answer, so that a sidecar is done with them before its next report. The others follow."""


def commands(report: home.Report, objects: Iterable[Checkpoint]) -> tuple[home.Command, ...]:
    """
    The pins that a job's sidecar shall set and remove, within `MAX_PINS`.

    Args:
        report: the job's newest.
        objects: all that name the job.
    """
    if not report.listed:
        return ()
    wishes: dict[int, set[bool | None]] = {}
    for each in objects:
        if each.status.step is not None and each.status.ready == TRUE:
            wishes.setdefault(each.status.step, set()).add(each.pin)
    made = []
    for stored in report.checkpoints:
        wished, is_pinned = wishes.get(stored.step, set()), holds(stored)
        if True in wished and not is_pinned:
            made.append(home.Command(id=f"pin-{stored.step}", kind=home.CommandKind.PIN.value, step=stored.step))
        elif wished == {False} and is_pinned:
            made.append(home.Command(id=f"unpin-{stored.step}", kind=home.CommandKind.UNPIN.value, step=stored.step))
    return tuple(made[:MAX_PINS])


def holds(stored: home.CommittedCheckpoint) -> bool:
    """Whether the cluster has pinned a checkpoint."""
    return home.CLUSTER in holders(stored)


def holders(stored: home.CommittedCheckpoint) -> Collection[str]:
    return [each for each in stored.pinned_by.split(",") if each]
