"""
Copies within the host's memory, shared out to as many threads as torch has.

Called from: `pillion.staging` and `pillion.device_copies`, with no mode on.

The tensors are cut into stretches of equal bytes, and a thread each copies one in one batched call: the GIL is given up once, not once a
tensor, because a trainer whose GIL is busy takes up to 5 ms (sys.getswitchinterval) to give it back. torch's own threads are not used:
they meet after each tensor, and on a machine whose cores are busy each meeting waits for the scheduler (measured: 64 tensors beside a
spinning thread, 0.10 s against 0.18 s).
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pillion import copiers as copiers_module
from pillion.wire import layout as layout_module

SPLIT_BYTES: Final = 4 * 1024**2
"""A stretch of copies ends at the end of a tensor, unless it would be this much too long: then it ends within it."""

KEPT_STRETCHES: Final = 1024
"""Ways to share a copy out that are remembered: one for saves, and one for each part of a load."""


class CopyFailed(Exception):
    """torch could not copy the tensor at `index`."""

    def __init__(self, index: int, why: str) -> None:
        self.index = index
        super().__init__(why)


@dataclass(frozen=True)
class Stretch:
    """What one thread copies: whole items [first, last), and elements [start, stop) of single items."""

    first: int
    last: int
    parts: tuple[tuple[int, int, int], ...]


class HostCopies:
    """
    The threads, and how copies were shared out to them before.

    Owns: its threads, until `close`. Thread-safe; one thread copies at a time.
    """

    def __init__(self) -> None:
        self._making = threading.Lock()
        """A thread prepares the arena while the trainer may save already: what both of them need is made once."""
        self._copiers: copiers_module.Copiers | None = None
        self._stretches: dict[tuple[str, int, int, int], tuple[Stretch, ...]] = {}

    def copy(
        self,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        layout: layout_module.Layout,
        first: int,
        last: int,
    ) -> None:
        """
        Copy items [first, last); sizes and dtypes are those of the layout.

        Raises:
            CopyFailed: torch cannot copy one.
        """
        copiers, stretches = self.share_out(layout, first, last)
        if copiers is None:
            for stretch in stretches:
                _copy(targets, sources, stretch)
            return
        copiers.each([functools.partial(_copy, targets, sources, stretch) for stretch in stretches])

    def copy_some(
        self,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        layout: layout_module.Layout,
        chosen: Sequence[int],
    ) -> None:
        """`copy`, of single items: how they are shared out is not remembered."""
        part = layout_module.Layout(tuple(layout.items[index] for index in chosen), (), {})
        try:
            self.copy([targets[i] for i in chosen], [sources[i] for i in chosen], part, 0, len(chosen))
        except CopyFailed as err:
            raise CopyFailed(chosen[err.index], str(err)) from err

    def share_out(
        self, layout: layout_module.Layout, first: int, last: int
    ) -> tuple[copiers_module.Copiers | None, tuple[Stretch, ...]]:
        """The threads, None where the caller copies itself, and what each is to copy. Remembered."""
        num_threads = torch.get_num_threads()
        with self._making:
            if num_threads > 1 and self._copiers is None:
                self._copiers = _copiers(num_threads)
            copiers = self._copiers
        if num_threads == 1 or copiers is None:
            return None, (Stretch(first, last, ()),)
        key = (layout.digest, first, last, num_threads)
        stretches = self._stretches.get(key)
        if stretches is None:
            if len(self._stretches) >= KEPT_STRETCHES:
                self._stretches.clear()
            stretches = self._stretches[key] = shared_out(layout, first, last, num_threads)
        return copiers, stretches

    def close(self) -> None:
        """End the threads. Blocks: see copiers.CLOSE_TIMEOUT_S."""
        if self._copiers is not None:
            self._copiers.close()
            self._copiers = None


def _copiers(num_threads: int) -> copiers_module.Copiers | None:
    """
    Threads in which torch's operations use one thread each; None where that cannot be had.

    The number of OpenMP threads is a property of each thread, and torch (2.6 to 2.15) offers only a setter that also
    changes it for threads of others. Source: OpenMP 5.0, 3.2.1 (omp_set_num_threads).
    """
    library = _openmp_library()
    if library is None:
        return None

    def alone() -> None:
        torch.get_num_threads()  # torch sets its own number at the first use in a thread: let it, and then set ours
        library.omp_set_num_threads(1)

    try:
        copiers = copiers_module.Copiers(num_threads, alone)
    except RuntimeError:  # no thread more: a limit, or the interpreter's end (Python 3.12)
        return None
    numbers: list[int] = []
    copiers.each([lambda: numbers.append(torch.get_num_threads())])
    if numbers != [1]:
        copiers.close()
        return None
    return copiers


def _openmp_library() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(None, 5)[5].strip() for line in maps if "omp" in line and line.count("/") > 0}
        for path in sorted(paths):
            if os.path.basename(path).startswith(("libgomp", "libiomp5", "libomp")):
                return ctypes.CDLL(path)
    except (OSError, IndexError):
        pass
    return None


def shared_out(layout: layout_module.Layout, first: int, last: int, num_threads: int) -> tuple[Stretch, ...]:
    """Cut items [first, last) into at most `num_threads` stretches of about equal bytes. Pure."""
    left = sum(layout.items[index].payload_bytes for index in range(first, last))
    stretches = []
    index, offset = first, 0
    for thread in range(num_threads, 0, -1):
        goal = left if thread == 1 else left // thread
        left -= goal
        parts: list[tuple[int, int, int]] = []
        begin = index
        if offset:
            numel = math.prod(layout.items[index].sizes)
            itemsize = layout.items[index].payload_bytes // numel
            stop = numel if thread == 1 else min(numel, offset + goal // itemsize)
            parts.append((index, offset, stop))
            goal -= (stop - offset) * itemsize
            index, offset = (index + 1, 0) if stop == numel else (index, stop)
            begin = index
        while not offset and index < last and (goal > 0 or thread == 1):
            size_bytes = layout.items[index].payload_bytes
            if size_bytes <= goal + SPLIT_BYTES or thread == 1:
                goal -= size_bytes
                index += 1
            else:
                itemsize = layout_module.ITEMSIZE_BYTES[layout.items[index].dtype]
                offset = max(1, goal // itemsize)
                parts.append((index, 0, offset))
                goal -= offset * itemsize
        left += goal
        stretches.append(Stretch(begin, index, tuple(parts)))
    return tuple(stretch for stretch in stretches if stretch.first < stretch.last or stretch.parts)


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stretch: Stretch) -> None:
    """
    Copy a stretch. Called from: the thread that copies, with no mode on.

    Raises:
        CopyFailed: one of the tensors cannot be copied.
    """
    indexes = range(stretch.first, stretch.last)
    if indexes:
        copy_each(list(targets[stretch.first : stretch.last]), list(sources[stretch.first : stretch.last]), indexes)
    for index, start, stop in stretch.parts:
        target, source = targets[index], sources[index]
        if target.is_contiguous() and source.is_contiguous():
            # Modes are properties of a thread: inference tensors can be changed, and viewed to be changed, only in this one.
            with torch.inference_mode():
                target, source = target.view(-1)[start:stop], source.view(-1)[start:stop]
            copy_one(target, source, index)
        elif start == 0:
            # Elements of a tensor of another order cannot be told apart cheaply: its first thread copies all of it.
            copy_one(target, source, index)


@torch.inference_mode()
def copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor], indexes: Sequence[int]) -> None:
    """Copy all in one call; where torch has none for them (conjugated targets), one after the other."""
    if not targets:
        return
    try:
        torch._foreach_copy_(targets, sources)
    except RuntimeError:
        for target, source, index in zip(targets, sources, indexes, strict=True):
            copy_one(target, source, index)


@torch.inference_mode()
def copy_one(target: torch.Tensor, source: torch.Tensor, index: int) -> None:
    """
    Copy one tensor.

    Raises:
        CopyFailed: torch cannot.
    """
    try:
        target.copy_(source)
    except RuntimeError as err:
        raise CopyFailed(index, str(err)) from err
