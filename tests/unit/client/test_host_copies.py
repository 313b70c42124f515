"""
Copies within host memory: which tensors memmove copies, and that torch copies all others.

Called from: pytest.
"""

import pytest
import torch

from pillion import host_copies
from pillion.wire.layout import Item, Layout

SMALL = 64
"""Bytes from which on memmove is used in these tests."""


@pytest.fixture(autouse=True)
def _moves_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copies, "MIN_MOVED_BYTES", SMALL)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    items = tuple(
        Item(
            f"t{index}",
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            (0,) * tensor.dim(),
            tuple(tensor.shape),
        )
        for index, tensor in enumerate(targets)
    )
    copies = host_copies.HostCopies()
    try:
        copies.copy(targets, sources, Layout(items, (), {}), 0, len(items))
    finally:
        copies.close()


SOURCES = {
    "contiguous": torch.arange(64.0),
    "small": torch.arange(4.0),
    "of one element": torch.tensor(3.0),
    "transposed": torch.arange(64.0).view(8, 8).t(),
    "with gaps": torch.arange(128.0)[::2],
    "channels last": torch.arange(192.0).view(2, 3, 4, 8).to(memory_format=torch.channels_last),
    "conjugated": torch.complex(torch.arange(16.0), torch.ones(16)).conj(),
    "negated": torch.complex(torch.arange(32.0), torch.ones(32)).conj().imag,
    "that needs a gradient": torch.arange(64.0, requires_grad=True),
    "large": torch.arange(5_000_000.0),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_tensor_is_copied_bit_for_bit(name: str) -> None:
    """Whatever the order of its elements in memory, and whichever way it is copied."""
    source = SOURCES[name]
    target = torch.zeros(source.shape, dtype=source.dtype)
    _copy([torch.zeros(3), target, torch.zeros(40)], [torch.ones(3), source, torch.ones(40)])
    assert torch.equal(target, source.resolve_conj().resolve_neg())


def test_torch_copies_what_memmove_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """memmove copies the large contiguous tensor; torch gets the small one and the transposed one."""
    seen: list[int] = []
    real = torch._foreach_copy_

    def spy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        seen.extend(source.numel() for source in sources)
        real(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", spy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    sources = [torch.ones(16), torch.ones(3), torch.ones(5, 5).t()]
    _copy([torch.zeros_like(source, memory_format=torch.contiguous_format) for source in sources], sources)
    assert seen == [3, 25]


def test_autograd_sees_that_a_tensor_was_loaded_into() -> None:
    """A tensor that backward still needs has another version after a load, by which torch refuses it."""
    weight = torch.ones(64, requires_grad=True)
    before = weight._version
    _copy([weight.detach()], [torch.zeros(64)])
    assert weight._version > before
    assert not weight.any()


def test_an_inference_tensor_is_loaded_into() -> None:
    """It has no version that could change."""
    with torch.inference_mode():
        target = torch.zeros(64)
    _copy([target], [torch.ones(64)])
    assert torch.equal(target, torch.ones(64))
