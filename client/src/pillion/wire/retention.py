"""
The part of the checkpoint policy that says which checkpoints stay: `retention`.

Producer, consumer, and what breaks them: as of `pillion.wire.policy`, which has the other fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pillion.wire.policy_document import Broken, Section, text_rule
from pillion.wire.quantities import BYTES, DURATION

Best = StrEnum("Best", {"MIN": "Min", "MAX": "Max"})
"""Which value of a metric is the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepBest(Section):
    """The best checkpoints, by a metric that the script gives with its saves."""

    metric: str = field(metadata=text_rule("the name of a metric, of 1 to 128 characters", r"[^\0\n]{1,128}"))
    """Its name in ``save(..., metrics={...})``. A checkpoint without it, or with NaN, is never one of the best."""
    mode: Best
    """Whether the smallest or the largest value is the best."""
    count: int = field(default=1, metadata={"most": 1000})
    """Number of best checkpoints that stay, besides the newest ones. Of equal values the newer checkpoint is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention(Section):
    """Which checkpoints stay. Always kept: the newest one, the last one that a load verified, and one that a load of the job is reading."""

    keep_last: int | None = None
    """Number of newest checkpoints that stay. None, the default: all. Nothing is removed unless the policy requests it."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this step stay forever, besides the last ones. None: no such step."""
    keep_best: KeepBest | None = None
    """The best checkpoints stay as well, besides the last ones. None: no metric counts."""
    max_age_seconds: int | None = field(default=None, metadata={"name": "maxAge", "unit": DURATION})
    """Age above which a checkpoint goes, whatever the fields above keep. It is compared with the time of the newest commit. None: no age."""
    max_bytes: int | None = field(default=None, metadata={"unit": BYTES})
    """
    Bytes that the checkpoints of the root may have together, after the retention that follows a commit. Above them the oldest goes first and
    the best of ``keep_best`` last, whatever the fields above keep. None: no quota.
    """

    @property
    def removes(self) -> bool:
        """Whether the policy ever removes a checkpoint."""
        return (self.keep_last, self.max_age_seconds, self.max_bytes) != (None, None, None)

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if self.keep_best is not None and self.keep_last is None:
            allowed = "keepLast together with keepBest: without keepLast every checkpoint stays"
            yield Broken(("keep_last", "keep_best"), "keepLast", None, allowed)
        if self.keep_every_steps is not None and self.keep_last is None:
            allowed = "keepLast together with keepEverySteps: without keepLast every checkpoint stays"
            yield Broken(("keep_last", "keep_every_steps"), "keepLast", None, allowed)


KEEP_ALL: Final = Retention()
"""The default: nothing is removed."""
