"""
Copies within host memory, divided among as many threads as torch uses.

Called from: `pillion.staging` and `pillion.device_copies`, with no torch mode on.

The tensors are cut into stretches of equal bytes. Each thread copies one stretch in one batched call, so it releases the GIL once and not
once a tensor. Each reacquisition takes up to 5 ms (sys.getswitchinterval) in a busy trainer. torch's own threads are not used: they
synchronize after each tensor, and on busy cores each synchronization waits for the scheduler (measured: 64 tensors beside a spinning
thread, 0.10 s against 0.18 s).

Large contiguous pieces are copied by memmove(3), which has stores for large copies that torch has not (docs/performance.md has the numbers).
It reacquires the GIL once a piece, so small pieces stay with torch.
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
"""Maximum excess of a stretch over its share. A stretch ends at the end of a tensor, unless it would exceed its share by more."""

MIN_MOVED_BYTES: Final = 4 * 1024**2
"""Minimum bytes of a piece that memmove copies. Reacquiring the GIL takes up to 0.1 ms within a save (`saving.HURRIED_SWITCH_S`): a tenth of the
time that so many bytes take."""

MAX_KEPT_DIVISIONS: Final = 1024
"""Maximum divisions of a copy that are remembered: one for saves, and one for each part of a load."""


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
    large: tuple[int, ...] = ()
    """The whole items that have MIN_MOVED_BYTES or more."""


class HostCopies:
    """
    The copying threads, and the remembered divisions of copies among them.

    Owns: its threads, until `close`. Thread-safe; one thread copies at a time.
    """

    def __init__(self) -> None:
        self._making = threading.Lock()
        """Held while the threads are made: the preparing thread and a save may need them at the same time."""
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
        Copy items [first, last). Their sizes and dtypes are those of the layout.

        Raises:
            CopyFailed: torch cannot copy a tensor.
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
        """Copy single items, as `copy` does. Their division among threads is not remembered."""
        part = layout_module.Layout(tuple(layout.items[index] for index in chosen), (), {})
        try:
            self.copy([targets[i] for i in chosen], [sources[i] for i in chosen], part, 0, len(chosen))
        except CopyFailed as err:
            raise CopyFailed(chosen[err.index], str(err)) from err

    def share_out(
        self, layout: layout_module.Layout, first: int, last: int
    ) -> tuple[copiers_module.Copiers | None, tuple[Stretch, ...]]:
        """Return the threads and the stretch of each. None instead of threads: the caller copies itself. Remembered."""
        num_threads = torch.get_num_threads()
        with self._making:
            if num_threads > 1 and self._copiers is None:
                self._copiers = _copiers(num_threads)
            copiers = self._copiers
        if num_threads == 1 or copiers is None:
            return None, (Stretch(first, last, (), _large(layout, first, last)),)
        key = (layout.digest, first, last, num_threads)
        stretches = self._stretches.get(key)
        if stretches is None:
            if len(self._stretches) >= MAX_KEPT_DIVISIONS:
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
    Return threads in which torch's operations are single-threaded. None if that is not possible.

    The number of OpenMP threads is a property of each thread. torch (2.6 to 2.15) has only a setter that also changes it for other
    threads. Source: OpenMP 5.0, 3.2.1 (omp_set_num_threads).
    """
    library = _openmp_library()
    if library is None:
        return None

    def alone() -> None:
        torch.get_num_threads()  # torch sets its number at the first use in a thread, so this call comes before the next line
        library.omp_set_num_threads(1)

    try:
        copiers = copiers_module.Copiers(num_threads, alone)
    except RuntimeError:  # no thread can start: a limit, or the interpreter's exit (Python 3.12)
        return None
    numbers: list[int] = []
    copiers.each([lambda: numbers.append(torch.get_num_threads())])
    if numbers != [1]:
        copiers.close()
        return None
    return copiers


def _openmp_library() -> ctypes.CDLL | None:
    """Return the OpenMP runtime that torch has loaded. None if it is not found."""
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
        stretches.append(Stretch(begin, index, tuple(parts), _large(layout, begin, index)))
    return tuple(stretch for stretch in stretches if stretch.first < stretch.last or stretch.parts)


def _large(layout: layout_module.Layout, first: int, last: int) -> tuple[int, ...]:
    return tuple(index for index in range(first, last) if layout.items[index].payload_bytes >= MIN_MOVED_BYTES)


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], stretch: Stretch) -> None:
    """
    Copy a stretch. Called from: the copying thread, with no torch mode on.

    Raises:
        CopyFailed: torch cannot copy a tensor.
    """
    moved = {index for index in stretch.large if move(targets[index], sources[index])}
    indexes = [index for index in range(stretch.first, stretch.last) if index not in moved]
    if indexes:
        copy_each([targets[index] for index in indexes], [sources[index] for index in indexes], indexes)
    for index, start, stop in stretch.parts:
        target, source = targets[index], sources[index]
        if target.is_contiguous() and source.is_contiguous():
            # Inference mode belongs to a thread. Inference tensors can be changed, and viewed for a change, only in inference mode.
            with torch.inference_mode():
                target, source = target.view(-1)[start:stop], source.view(-1)[start:stop]
            if source.nbytes < MIN_MOVED_BYTES or not move(target, source):
                copy_one(target, source, index)
        elif start == 0:
            # A tensor of another memory order cannot be split cheaply: the thread of its first part copies all of it.
            copy_one(target, source, index)


def move(target: torch.Tensor, source: torch.Tensor) -> bool:
    """
    Copy one tensor in host memory by memmove, if both have their elements in the same order. Both have the same sizes. Releases the GIL.

    Returns:
        Whether it was copied. If not, the tensors differ by more than their addresses, and torch has to copy.
    """
    alike = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    if not alike or source.is_conj() != target.is_conj() or source.is_neg() != target.is_neg():
        return False
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    if not target.is_inference():  # which has no version
        torch.autograd.graph.increment_version(target)
    return True


@torch.inference_mode()
def copy_each(targets: list[torch.Tensor], sources: list[torch.Tensor], indexes: Sequence[int]) -> None:
    """Copy all tensors in one call. If torch does not support that (conjugated targets), copy one after another."""
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
        CopyFailed: torch cannot copy it.
    """
    try:
        target.copy_(source)
    except RuntimeError as err:
        raise CopyFailed(index, str(err)) from err
