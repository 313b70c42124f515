"""
The whole of: what optimizers hold in memory, and which changes of a tensor an overlapped save sees.

Called from: pytest.
"""

import math

import pytest
import torch

from pillion import late, overlap

ELEMENTS = 200_000
PER_SAMPLE = overlap.SAMPLE_BYTES // 4


def stepped(*tensors: torch.Tensor) -> tuple[torch.optim.Optimizer, overlap.Steppers]:
    optimizer = torch.optim.Adam(tensors, lr=0.1)
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    steppers = overlap.Steppers()
    steppers.add(optimizer)
    return optimizer, steppers


def holds(stretches: late.Stretches, tensor: torch.Tensor) -> bool:
    start = overlap.start_of(tensor)
    return start > 0 and stretches.covers(start, start + tensor.nbytes)


def test_an_optimizer_holds_its_parameters_and_its_state_and_nothing_else() -> None:
    """What an optimizer holds counts under whatever tensor object; averages, slices with gaps and conjugates do not."""
    weight = torch.nn.Parameter(torch.zeros(500, 400))
    optimizer, steppers = stepped(weight)
    held = steppers.stretches()
    later = [weight, weight.detach(), weight.t(), weight[3:], *(v for v in optimizer.state[weight].values() if v.dim())]
    assert all(holds(held, tensor) for tensor in later)
    at_once = [weight.detach().clone(), weight[:, 1:], weight.detach()[::2], torch.zeros(3)]
    assert not any(holds(held, tensor) for tensor in at_once)
    waves = torch.zeros(ELEMENTS, dtype=torch.complex64)
    _optimizer, steppers = stepped(waves)
    assert holds(steppers.stretches(), waves)
    assert not holds(steppers.stretches(), waves.conj())


def test_a_buffer_beside_a_weight_in_one_allocation_is_not_the_optimizers() -> None:
    """Only the weight's own bytes of a flat buffer wait: a step changes no others, and something else may change those."""
    flat = torch.zeros(2 * ELEMENTS)
    _optimizer, steppers = stepped(flat[:ELEMENTS])
    assert holds(steppers.stretches(), flat[10:ELEMENTS])
    assert not holds(steppers.stretches(), flat[ELEMENTS:])
    assert not holds(steppers.stretches(), flat)


def test_an_optimizer_that_is_gone_protects_nothing() -> None:
    """Weights whose optimizer was dropped may be changed by anything, and are copied at once again."""
    steppers = overlap.Steppers()
    weight = torch.zeros(ELEMENTS)
    steppers.add(torch.optim.SGD([weight], lr=0.1))
    assert not steppers.stretches()


def test_an_optimizer_in_a_cuda_graph_protects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph repeats the captured step without a hook, so nothing that such an optimizer holds waits, also after a step outside."""
    weight = torch.zeros(ELEMENTS)
    optimizer, steppers = stepped(weight)
    monkeypatch.setattr(overlap, "capturing", lambda: True)
    steppers.add(optimizer)
    monkeypatch.setattr(overlap, "capturing", lambda: False)
    steppers.add(optimizer)
    assert not steppers.stretches()


def test_recent_optimizers_are_those_that_stepped_since_the_last_question() -> None:
    """An optimizer that steps no more is not recent: something else may have taken its weights over."""
    optimizer, steppers = stepped(torch.zeros(ELEMENTS))
    assert steppers.recent() == [optimizer]
    assert steppers.recent() == []
    steppers.add(optimizer)
    assert steppers.recent() == [optimizer]


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
    sample = overlap.Sample([tensor], offset_bytes=0)
    tensor.data[1 : PER_SAMPLE - 1] = 1.0
    assert sample.changed() is None
    tensor.data[1 : PER_SAMPLE + 1] = 1.0
    assert sample.changed() == 0


def test_each_sample_takes_other_elements() -> None:
    """One changed element, which most samples miss, is found by one that begins at it: recurring small changes are found some day."""
    tensor = torch.zeros(ELEMENTS)
    samples = [overlap.Sample([tensor], offset_bytes=offset) for offset in range(0, overlap.SAMPLE_BYTES, 4096)]
    tensor.data[2048] = 1.0
    assert [sample.changed() for sample in samples].count(0) == 1
