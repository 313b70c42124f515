"""
One save taken apart: where the time goes for which training waits.

Called from: run.py. Wraps the functions of a save with a clock, so a change of its steps shows here by a missing name. Without overlap, as all of
it is the training thread's then.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import measures

from pillion import leaves, opaque, session, staging

STEPS: dict[str, tuple[type, str]] = {
    "walk of the state dict": (leaves.Collector, "collect"),
    "what is pickled": (opaque.Pickler, "pickled"),
    "claim of a slot": (session.Session, "claim"),
    "copy": (staging.SegmentMapping, "copy_in"),
    "seal": (staging.SegmentMapping, "seal"),
    "telling the sidecar": (session.Session, "sealed"),
}
"""What a row says -> the function, which none of the others calls."""


def measure(of: measures.Settings) -> list[measures.Line]:
    lines: list[measures.Line] = []
    for num_tensors in (64, 10_000):
        state_dict = measures.state(of.num_bytes, num_tensors)
        stalls: list[float] = []
        spent: dict[str, list[float]] = {name: [] for name in STEPS}
        with measures.scratch(of) as root, measures.checkpointer(root) as checkpointer, clocks(spent):
            measures.prepare(checkpointer, state_dict)
            for step in range(1, of.repeat + 2):
                handle = checkpointer.save(state_dict, step, overlap=False)
                stalls.append(handle.stall_s)
                handle.result(measures.SAVE_TIMEOUT_S)
        used = {name: samples[-of.repeat :] for name, samples in spent.items()}
        stalls = stalls[-of.repeat :]
        rest = [stall - sum(each) for stall, each in zip(stalls, zip(*used.values(), strict=True), strict=True)]
        for name, samples in {**used, "everything else": rest}.items():
            share = statistics.median(samples) / statistics.median(stalls)
            what = f"of a save of {num_tensors} tensors: {name}"
            lines.append(measures.median_line(what, [1000 * each for each in samples], unit="ms", note=f"{share:.1%}"))
        what = f"a save of {num_tensors} tensors, all of it"
        lines.append(measures.median_line(what, [1000 * each for each in stalls], unit="ms"))
    return lines


@contextlib.contextmanager
def clocks(spent: dict[str, list[float]]) -> Iterator[None]:
    """Note the seconds of each call of the functions in STEPS."""
    with contextlib.ExitStack() as undo:
        for name, (owner, function) in STEPS.items():
            plain = getattr(owner, function)
            undo.callback(setattr, owner, function, plain)
            setattr(owner, function, _clocked(plain, spent[name]))
        yield


def _clocked(plain: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def clocked(*arguments: Any, **named: Any) -> Any:
        begin_s = time.perf_counter()
        try:
            return plain(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - begin_s)

    return clocked
