"""
The whole of: which targets of a load share memory, and hold not what was stored for them.

Called from: pytest.
"""

from collections.abc import Sequence

import torch

from pillion import sharing


def conflicts(targets: Sequence[torch.Tensor], stored: Sequence[torch.Tensor]) -> list[int]:
    """Those of a load that copies one after the other."""
    for target, value in zip(targets, stored, strict=True):
        target.copy_(value)
    return sharing.conflicting(targets, stored)


def test_two_names_of_one_tensor_conflict_only_where_the_checkpoint_has_two_values() -> None:
    """Tied weights that were saved tied are as they were, also where they are converted or NaN."""
    tied, apart = torch.zeros(2), torch.zeros(2)
    one, two = torch.ones(2), torch.full((2,), 2.0)
    assert conflicts([apart, tied, tied], [one, one, two]) == [1, 2]
    assert conflicts([apart, tied, tied], [two, one, one]) == []
    assert conflicts([tied, tied.view(2, 1)], [one.double() / 3, one.double().view(2, 1) / 3]) == []
    assert conflicts([tied, tied], [one * torch.nan] * 2) == []


def test_views_conflict_only_where_they_share_elements() -> None:
    """Columns lie between one another and share none; what has no elements shares nothing."""
    base = torch.zeros(3, 2)
    values = torch.arange(6.0).view(3, 2)
    assert conflicts([base[:, 0], base[:, 1], base[:0]], [values[:, 0], values[:, 1], values[:0]]) == []
    assert conflicts([base[:1, 0], base[1:2, 0], base[:1]], [values[:1, 0], values[1:2, 0], values[:1]]) == []
    assert conflicts([base[:2], base[1:]], [values[:2], values[1:]]) == []
    assert conflicts([base[:2], base[1:]], [values[:2], values[1:] + 1]) == [0, 1]


def test_a_conjugated_view_is_compared_by_its_values() -> None:
    """Its memory has the conjugated ones."""
    base = torch.zeros(2, dtype=torch.complex64)
    value = torch.tensor([1 + 2j, 3j])
    assert conflicts([base, base.conj()], [value, value.conj()]) == []
    assert conflicts([base, base.conj()], [value, value]) == [0, 1]
