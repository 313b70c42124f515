"""
What a load has to say: what a run resumes from, in one line, and the differences between request and result, in one warning. Pure, except
for the log.

Called from: `pillion.loading` (the differences), `pillion.checkpointer` (the line). None of these differences is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from pillion import leaves as leaves_module
from pillion.handle import LoadReport
from pillion.wire import layout as layout_module
from pillion.wire.load_messages import Tier

SHOWN: Final = 20
"""Maximum names of each kind in the warning. `last_load` has all of them."""

_PLACES: Final = {Tier.ARENA: "memory", Tier.LOCAL: "local disk", Tier.STORAGE: "storage"}

_log = logging.getLogger(__name__)


def narrowed(stored: Mapping[str, str], layout: layout_module.Layout) -> dict[str, str]:
    """Return FQN -> conversion (`int64 -> int16`), for each wanted dtype that cannot hold every stored value."""
    return {
        item.fqn: f"{stored[item.fqn]} -> {item.dtype}"
        for item in layout.items
        if item.fqn in stored and _narrows(stored[item.fqn], item.dtype)
    }


def _narrows(stored: str, wanted: str) -> bool:
    """Whether the stored dtype has a value that the wanted dtype cannot hold."""
    before, after = leaves_module.DTYPES.get(stored), leaves_module.DTYPES.get(wanted)
    if before is None or after is None or before in (after, torch.bool):
        return False
    if after is torch.bool or (before.is_complex and not after.is_complex):
        return True
    try:
        return not (_floats_hold(before, after) if _is_float(after) else _integers_hold(before, after))
    except (TypeError, NotImplementedError):  # a type without limits, such as packed 4-bit floats
        return True


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _integers_hold(before: torch.dtype, after: torch.dtype) -> bool:
    if _is_float(before):
        return False
    one, other = torch.iinfo(before), torch.iinfo(after)
    return other.min <= one.min and one.max <= other.max


def _floats_hold(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether float type `after` holds every value of `before`. Compares precision, both limits, and the smallest value."""
    target = torch.finfo(after)
    if not _is_float(before):
        limits = torch.iinfo(before)
        return (
            2.0 ** (1 - limits.max.bit_length()) >= target.eps and target.min <= limits.min and limits.max <= target.max
        )
    one = torch.finfo(before)
    least, of_least = one.smallest_normal * one.eps, target.smallest_normal * target.eps
    return one.eps >= target.eps and target.min <= one.min and one.max <= target.max and least >= of_least


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def empty_containers(state_dict: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the names of empty mappings, which request nothing."""
    for key, value in state_dict.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            if value:
                yield from empty_containers(value, name)
            else:
                yield name


def warn(report: LoadReport, *, empty: Sequence[str], first: bool, alike: bool, what: str = "") -> None:
    """
    Log one warning with all differences of a load, if there are any.

    Args:
        report: the report of this rank's load.
        empty: names of the empty mappings in the state dict.
        first: whether this is rank 0, which logs for all ranks.
        alike: whether all ranks have the same differences in their own leaves.
        what: name of a checkpoint that was loaded by its place. Empty: it is one of this run.
    """
    elsewhere, what = bool(what), what or f"step {report.step} from {report.tier}"
    notes = [
        *(_of_all(report, empty, elsewhere=elsewhere) if first else ()),
        *(_of_own(report) if first or not alike else ()),
    ]
    if notes:
        _log.warning("pillion: loaded %s, with these differences:%s", what, "".join(f"\n  - {n}" for n in notes))


def resumed(report: LoadReport, *, root: str, given: bool) -> str:
    """
    Return the line that says what a run goes on from.

    Args:
        report: of a load that found a checkpoint.
        root: of the run.
        given: whether the script has named the place of the checkpoint.
    """
    # Of the run's own checkpoints the step says all. Another job's may be one that the policy names.
    is_own = report.path is None or (report.path.startswith(f"{root}/") and not given)
    where = "" if is_own else f" in {report.path}"
    return f"resumed from step {report.step}{where} ({_PLACES[report.tier]}, {report.elapsed_s:.2f} s)"


def _of_own(report: LoadReport) -> Iterator[str]:
    """Yield the notes that may differ from rank to rank."""
    if report.missing:
        yield f"not in the checkpoint, and left unchanged: {_list(report.missing)}"
    if report.narrowed:
        yield f"converted to a dtype that cannot hold every stored value: {_list([f'{k} ({v})' for k, v in report.narrowed.items()])}"
    if report.conflicting:
        yield (
            "these tensors share memory, and the checkpoint has different values for them, so one value overwrote the others:"
            f" {_list(report.conflicting)}; give each name its own tensor"
        )
    if report.replaced:
        yield f"could not be filled in place; the state dict holds new objects for: {_list(report.replaced)}"


def _of_all(report: LoadReport, empty: Sequence[str], *, elsewhere: bool) -> Iterator[str]:
    """Yield the notes that are the same on every rank."""
    if report.unexpected:
        yield f"in the checkpoint, but not in the state dict of any rank: {_list(report.unexpected)}"
        lost = [name for name in empty if any(_below(each, name) for each in report.unexpected)]
        if lost:
            yield (
                f"{_list(lost)} was empty in the state dict, so it was not restored. A new optimizer has no state before its first"
                " step: if Checkpointer.find() finds a checkpoint, build the state dict with"
                " torch.distributed.checkpoint.state_dict.get_state_dict(model, optimizer), which creates that state"
            )
    if report.differing:
        yield (
            f"the ranks saved different values under one name, and storage keeps the lowest rank's only: {_list(report.differing)};"
            " give each rank's value its own key"
        )
    for where, why in report.passed_over.items():
        yield f"the newer snapshot {where} in memory was not used: {why}"
    if report.set_aside and elsewhere:
        yield (
            f"this run has checkpoints of its own, the newest step is {report.set_aside[-1]}: they were not loaded, and after the next"
            " save they are not what a restart takes; to resume from them call load() without path first, and load from elsewhere"
            " only if it returns None"
        )
    elif report.set_aside:
        steps = ", ".join(map(str, report.set_aside[:SHOWN]))
        yield (
            f"the committed steps {steps} are newer and set aside: they stay on storage until retention deletes them;"
            f" load(state, step={report.set_aside[-1]}) loads one of them"
        )


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
