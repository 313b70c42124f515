"""
What torch optimizers hold in memory, and how an overlapped save detects that a tensor changed meanwhile.

Called from: `pillion.habits`, `pillion.saving`, on the training thread and on the staging thread.

An overlapped save returns before it has copied all tensors. Three mechanisms make that safe:

- Only tensors that a torch optimizer steps are copied later (`pillion.late`). They change in `step()`, and a hook makes each `step()` wait
  for the copy. Averages, frozen weights, and weights that other code updates are copied before `save` returns.
- torch counts in-place changes (`Tensor._version`).
- torch does not count changes through `.data` or through a pointer (a kernel, a CUDA graph, numpy). For them, the save keeps one element
  in SAMPLE_BYTES, and compares it after the copy.

From then on, `save` copies a tensor that was changed before it returns.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from pillion import late, modes

SAMPLE_BYTES: Final = 64 * 1024
"""Distance of the sampled elements that detect changes. For 1 GiB in 300 tensors the sample takes 1 to 5 ms before `save` returns (measured
on two busy cores, where a copy takes 0.7 s). One element in 4 KiB takes 10 to 25 ms, and a comparison of all bytes 1.3 s."""

_INTEGERS: Final[Mapping[int, torch.dtype]] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> integer dtype for comparing its bits. (A NaN does not equal itself.)"""

_NO_MARKS: Final[Mapping[torch.device, Any]] = {}


class Steppers:
    """The optimizers that have stepped. Their parameters and state change only in `step()`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._recent: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._captured: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those that stepped while a CUDA graph was captured. The graph repeats that step without a hook."""

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        with self._lock:
            self._seen.add(optimizer)
            self._recent.add(optimizer)
            if capturing():
                self._captured.add(optimizer)

    def alive(self) -> list[torch.optim.Optimizer]:
        with self._lock:
            return list(self._seen)

    def recent(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers that have stepped since the last call."""
        with self._lock:
            recent = list(self._recent)
            self._recent.clear()
        return recent

    def stretches(self, optimizers: Sequence[torch.optim.Optimizer] | None = None) -> late.Stretches:
        """
        Return the memory of all parameters and all state of these optimizers.

        Args:
            optimizers: None for all. A captured one is left out.
        """
        with self._lock:
            captured = set(self._captured)
            chosen = list(self._seen) if optimizers is None else optimizers
        held = (tensor for each in chosen if each not in captured for tensor in _held(each))
        return late.Stretches((start, start + size) for start, size in map(_stretch, held) if start)


def capturing() -> bool:
    """Whether the current stream captures a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _held(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the parameters and the tensors of the state; for a DTensor its shard."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield getattr(parameter, "_local_tensor", parameter)
    for state in optimizer.state.values():
        values: Iterable[Any] = state.values() if isinstance(state, Mapping) else ()
        for value in values:
            if isinstance(value, torch.Tensor):
                yield getattr(value, "_local_tensor", value)


def _stretch(tensor: torch.Tensor) -> tuple[int, int]:
    """Return start and size in bytes of the memory that a tensor fills. (0, 0) if it fills none."""
    try:
        return start_of(tensor), tensor.numel() * tensor.element_size()
    except (RuntimeError, NotImplementedError):  # a wrapper around other tensors
        return 0, 0


def start_of(tensor: torch.Tensor) -> int:
    """Return the address of the first byte. 0 if the elements do not fill one stretch of memory, or are conjugated or negated."""
    return tensor.data_ptr() if _is_packed(tensor) else 0


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill a contiguous stretch of memory, in any order, without pending conjugation or negation."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.is_contiguous():
        return True
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return extent == tensor.numel()


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """Return a flat view of a packed tensor's bits, in the order of memory: as words of 8 bytes, where they are aligned, or as elements."""
    if tensor.element_size() > max(_INTEGERS):  # complex128
        tensor = torch.view_as_real(tensor)
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    flat = bits.as_strided((bits.numel(),), (1,), bits.storage_offset())
    size = flat.element_size()
    aligned = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
    return flat.view(torch.int64) if aligned else flat


class Sample:
    """
    A copy of a few elements of each tensor: one in SAMPLE_BYTES, in the order of memory.

    Args:
        tensors: large tensors for which `late.choose` says late.
        offset_bytes: offset of the first element, below SAMPLE_BYTES. By default it is drawn: a script that changes the same few
            elements behind each save is found out by one of them.

    Blocks: some 10 us a tensor. On a GPU its current stream copies the elements.
    """

    @modes.off()
    def __init__(self, tensors: Sequence[torch.Tensor], *, offset_bytes: int | None = None) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for index, tensor in enumerate(tensors):
            groups[tensor.device, tensor.dtype].append(index)
        self._tensors = tensors
        # Not from the script's own random numbers.
        self._offset_bytes = secrets.randbelow(SAMPLE_BYTES) if offset_bytes is None else offset_bytes
        self._groups = list(groups.values())
        self._taken = [self._elements([tensors[index] for index in group]) for group in self._groups]

    @modes.off()
    def changed(self, *, ready: Mapping[torch.device, Any] = _NO_MARKS) -> int | None:
        """
        Return the index of a tensor whose sampled elements have changed. None if there is none.

        Args:
            ready: for each CUDA device an event that was recorded after this sample.

        Blocks: on a GPU, for one small copy on a stream of its own.
        """
        for group, taken in zip(self._groups, self._taken, strict=True):
            tensors = [self._tensors[index] for index in group]
            if taken.is_cuda:
                # Not on the current stream: behind a whole backward pass the answer would come too late.
                stream = torch.cuda.Stream(taken.device)
                stream.wait_event(ready[taken.device])
                with torch.cuda.stream(stream):
                    same = (self._elements(tensors) == taken).cpu()
            else:
                same = self._elements(tensors) == taken
            if not bool(same.all()):
                lengths = [self._elements([tensor]).numel() for tensor in tensors]
                for index, part in zip(group, same.split(lengths), strict=True):
                    if not bool(part.all()):
                        return index
        return None

    def _elements(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a copy of the sampled elements of tensors of one dtype, concatenated, as integers."""
        return torch.cat([_strided(tensor, self._offset_bytes) for tensor in tensors])


def _strided(tensor: torch.Tensor, offset_bytes: int) -> torch.Tensor:
    if tensor.element_size() > max(_INTEGERS):  # complex128
        tensor = torch.view_as_real(tensor)
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    # An odd step does not meet the same column of every row.
    step = SAMPLE_BYTES // bits.element_size() - 1
    first = offset_bytes // bits.element_size() % min(step, bits.numel())
    return bits.as_strided(((bits.numel() - 1 - first) // step + 1,), (step,), bits.storage_offset() + first)
