"""
Finds load targets that share memory, although the checkpoint has a different value for each.

Called from: `loading`, after the copy, while the slot is still reserved. Pure. Tied weights that were saved tied have equal values, so
they do not conflict. Interleaved views share no element, and each holds its stored value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from pillion import modes


@modes.off()
def conflicting(tensors: Sequence[torch.Tensor], stored: Sequence[torch.Tensor]) -> list[int]:
    """
    Return the indexes of tensors that share memory, if at least one of them does not hold its stored value.

    Args:
        tensors: the targets, after the copy.
        stored: the source of each; of any dtype.
    """
    indexes = []
    for group in _groups(tensors):
        if not all(_holds(tensors[index], stored[index]) for index in group):
            indexes += group
    return sorted(indexes)


def _groups(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Yield groups of two or more indexes, whose tensors have overlapping address ranges."""
    reaches = sorted(_reaches(tensors))
    group: list[int] = []
    device, end = 0, 0
    for on, first, last, index in reaches:
        if group and on == device and first < end:
            group.append(index)
            end = max(end, last)
            continue
        if len(group) > 1:
            yield group
        group, device, end = [index], on, last
    if len(group) > 1:
        yield group


def _reaches(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int, int, int]]:
    """Yield device, first address, end address and index of each tensor with elements."""
    for index, tensor in enumerate(tensors):
        span = tensor.numel()
        if span:
            if not tensor.is_contiguous():
                span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            first = tensor.data_ptr()
            yield tensor.get_device(), first, first + span * tensor.itemsize, index


@torch.inference_mode()
def _holds(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether the two are equal bit for bit. (A NaN would not equal itself by value.)"""
    return torch.equal(_bits(tensor), _bits(stored.to(tensor.dtype)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    # A contiguous tensor of one element may have any stride, which a view of bytes refuses.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
