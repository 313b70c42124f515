"""
The whole of: targets of a load that share memory, while the checkpoint has a value for each.

Called from: `loading`, when all is copied and the slot is still lent. Pure. Tied weights that were saved tied have equal values and are no
conflict; views that lie between one another share no element, and each of them holds what was stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from pillion import modes


@modes.off()
def conflicting(tensors: Sequence[torch.Tensor], stored: Sequence[torch.Tensor]) -> list[int]:
    """
    The indexes of tensors that share memory with another one, where one of them does not hold what is stored for it.

    Args:
        tensors: as they are after the copy.
        stored: what was copied to each; of any dtype.
    """
    indexes = []
    for group in _groups(tensors):
        if not all(_holds(tensors[index], stored[index]) for index in group):
            indexes += group
    return sorted(indexes)


def _groups(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Indexes of tensors whose reaches overlap, two and more together."""
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
    """Device, first byte, the byte behind the last one, and index, of each tensor that has elements."""
    for index, tensor in enumerate(tensors):
        span = tensor.numel()
        if span:
            if not tensor.is_contiguous():
                span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            first = tensor.data_ptr()
            yield tensor.get_device(), first, first + span * tensor.itemsize, index


@torch.inference_mode()
def _holds(tensor: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether they are equal bit for bit, as NaN equals no NaN."""
    return torch.equal(_bits(tensor), _bits(stored.to(tensor.dtype)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    # A contiguous tensor of one element may have any stride, which a view of bytes refuses.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
