"""
Which tensors an overlapped save may copy later, and how it detects that one changed meanwhile.

Called from: `pillion.saving`, on the training thread and on the staging thread.

An overlapped save returns before it has copied all tensors. Three mechanisms make that safe:

- Only tensors that a torch optimizer steps are copied later. They change in `step()`, and a hook makes each `step()` wait for the copy.
  Averages, frozen weights, and weights that other code updates are copied before `save` returns.
- torch counts in-place changes (`Tensor._version`).
- torch does not count changes through `.data` or through a pointer (a kernel, a CUDA graph, numpy). For them, the save keeps one element
  in SAMPLE_BYTES, and compares it after the copy.

From then on, `save` copies a tensor that was changed before it returns.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from pillion import modes

SMALL_LEAF_BYTES: Final = 64 * 1024
"""Maximum size of a leaf that is copied to private memory at once. Buffers that a forward pass changes are this small (BatchNorm's
statistics, step counters), and so are most leaves."""
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

    def add(self, optimizer: torch.optim.Optimizer) -> None:
        with self._lock:
            self._seen.add(optimizer)

    def storages(self) -> set[int]:
        """Return the storage addresses of all parameters and all state of these optimizers."""
        with self._lock:
            seen = list(self._seen)
        addresses: set[int] = set()
        for optimizer in seen:
            for group in optimizer.param_groups:
                addresses.update(map(_storage, group["params"]))
            for state in optimizer.state.values():
                addresses.update(_storage(value) for value in state.values() if isinstance(value, torch.Tensor))
        addresses.discard(0)
        return addresses


def _storage(tensor: Any) -> int:
    """Return the address of a tensor's storage; for a DTensor of its shard's. 0 if it has no storage."""
    try:
        return int(getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0


def is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() <= SMALL_LEAF_BYTES


def may_wait(tensor: torch.Tensor, stepped: set[int]) -> bool:
    """Whether a large tensor may be copied after `save` has returned. `stepped`: the result of `Steppers.storages`."""
    return _storage(tensor) in stepped and _is_packed(tensor)


def _is_packed(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill a contiguous stretch of memory, in any order, without pending conjugation or negation."""
    if tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.is_contiguous():
        return True
    extent = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return extent == tensor.numel()


class Sample:
    """
    A copy of a few elements of each tensor: one in SAMPLE_BYTES, in the order of memory.

    Args:
        tensors: large tensors for which `may_wait` is True.

    Blocks: some 10 us a tensor. On a GPU its current stream copies the elements.
    """

    @modes.off()
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for index, tensor in enumerate(tensors):
            groups[tensor.device, tensor.dtype].append(index)
        self._tensors = tensors
        self._groups = list(groups.values())
        self._taken = [_elements([tensors[index] for index in group]) for group in self._groups]

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
                    same = (_elements(tensors) == taken).cpu()
            else:
                same = _elements(tensors) == taken
            if not bool(same.all()):
                lengths = [_elements([tensor]).numel() for tensor in tensors]
                for index, part in zip(group, same.split(lengths), strict=True):
                    if not bool(part.all()):
                        return index
        return None


def _elements(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a copy of the sampled elements of tensors of one dtype, concatenated, as integers."""
    return torch.cat([_strided(tensor) for tensor in tensors])


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.element_size() > max(_INTEGERS):  # complex128
        tensor = torch.view_as_real(tensor)
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    # An odd step does not meet the same column of every row.
    step = SAMPLE_BYTES // bits.element_size() - 1
    return bits.as_strided(((bits.numel() - 1) // step + 1,), (step,), bits.storage_offset())
