"""
The whole of: which tensors an overlapped copy may leave for later, and which changes of theirs are seen.

Called from: pytest.
"""

import math

import pytest
import torch

from pillion import overlap

ELEMENTS = 200_000
PER_SAMPLE = overlap.SAMPLE_BYTES // 4


def stepped(*tensors: torch.Tensor) -> tuple[torch.optim.Optimizer, set[int]]:
    optimizer = torch.optim.Adam(tensors, lr=0.1)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    steppers = overlap.Steppers()
    steppers.add(optimizer)
    return optimizer, steppers.storages()


def test_parameters_and_state_of_an_optimizer_may_wait_and_nothing_else() -> None:
    """What an optimizer holds, under whatever tensor object, is copied later; averages, slices with gaps and conjugates are not."""
    weight = torch.nn.Parameter(torch.zeros(500, 400))
    optimizer, stored = stepped(weight)
    later = [weight, weight.detach(), weight.t(), *(v for v in optimizer.state[weight].values() if v.dim())]
    assert all(overlap.may_wait(tensor, stored) for tensor in later)
    at_once = [weight.detach().clone(), weight[:, 1:], weight.detach()[::2], torch.zeros(3)]
    assert not any(overlap.may_wait(tensor, stored) for tensor in at_once)
    waves = torch.zeros(ELEMENTS, dtype=torch.complex64)
    _, stored = stepped(waves)
    assert overlap.may_wait(waves, stored)
    assert not overlap.may_wait(waves.conj(), stored)


def test_an_optimizer_that_is_gone_protects_nothing() -> None:
    """Weights whose optimizer was dropped may be changed by anything, and are copied at once again."""
    steppers = overlap.Steppers()
    weight = torch.zeros(ELEMENTS)
    steppers.add(torch.optim.SGD([weight], lr=0.1))
    assert steppers.storages() == set()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.float64, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.uint16,
    ],
)  # fmt: skip
def test_a_change_of_a_stretch_is_seen_and_named(dtype: torch.dtype) -> None:
    """A stretch of SAMPLE_BYTES that changes anywhere, through `.data`, is found, with the index of its tensor."""
    tensors = [torch.zeros(ELEMENTS).to(dtype), torch.zeros(ELEMENTS).to(dtype), torch.zeros(5000, 40).to(dtype).t()]
    sample = overlap.Sample(tensors)
    assert sample.changed() is None
    length = overlap.SAMPLE_BYTES // tensors[0].element_size()
    for index, start in ((0, 0), (1, ELEMENTS - length), (1, 12_345)):
        if start < 0 or start + length > ELEMENTS:
            continue
        changed = tensors[index].data[start : start + length].view(torch.uint8)
        changed.fill_(1)
        assert sample.changed() == index
        changed.zero_()
    assert sample.changed() is None


def test_a_numpy_alias_is_seen_and_nan_is_equal_to_itself() -> None:
    """torch counts no change through numpy; tensors that hold NaN all the time are not changed."""
    tensor = torch.full((ELEMENTS,), math.nan)
    before = tensor._version
    sample = overlap.Sample([tensor])
    assert sample.changed() is None
    tensor.numpy()[:] = 1.0
    assert tensor._version == before
    assert sample.changed() == 0


def test_a_change_between_the_sampled_elements_is_not_seen() -> None:
    """The documented limit of detection: a change of less than SAMPLE_BYTES in one place."""
    tensor = torch.zeros(ELEMENTS)
    sample = overlap.Sample([tensor])
    tensor.data[1 : PER_SAMPLE - 1] = 1.0
    assert sample.changed() is None
    tensor.data[1 : PER_SAMPLE + 1] = 1.0
    assert sample.changed() == 0
