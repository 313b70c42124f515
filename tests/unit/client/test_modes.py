"""
The whole of: what a slot of the arena holds, and what a load fills, when the calling thread is in one of torch's modes.

Called from: pytest.
Must never: need a sidecar; the segment is a file of the test.
"""

import contextlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pillion import leaves, modes, staging
from pillion.errors import IncompatibleCheckpoint
from pillion.wire import arena

STRIDE_BYTES = 16 * 1024**2
LARGE = 3_000_000
"""Elements that two threads share: more than host_copies.SPLIT_BYTES."""


class Refusing(TorchFunctionMode):
    """A function mode in which nothing works."""

    def __torch_function__(self, func: Callable[..., Any], *_: object, **__: object) -> Any:
        raise AssertionError(f"{func} was called in the user's mode")


class Dispatching(TorchDispatchMode):
    """A dispatch mode in which nothing works."""

    def __torch_dispatch__(self, func: Any, *_: object, **__: object) -> Any:
        raise AssertionError(f"{func} was called in the user's mode")


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
    "meta device": lambda: torch.device("meta"),
    "function": Refusing,
    "dispatch": Dispatching,
    "gradients": torch.enable_grad,
}


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    path = tmp_path / "segment"
    header = arena.SegmentHeader(num_slots=2, stride_bytes=STRIDE_BYTES)
    path.write_bytes(header.pack())
    os.truncate(path, header.segment_bytes)
    return path


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def num_threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "large": torch.full((LARGE,), value),
        "small": torch.full((3,), value),
        "empty": torch.empty(0, 4),
        "trained": torch.nn.Parameter(torch.full((2, 2), value)),
    }


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_the_caller_changes_nothing(segment: Path, mode: str, num_threads: int) -> None:
    """What is staged and loaded inside a mode is right, and so is what is staged and loaded in that slot outside of it."""
    collector = leaves.Collector()
    with contextlib.closing(staging_mapping := _Mapping(segment, MODES[mode])) as opened:
        mapping = staging_mapping.mapping
        for inside, value in ((True, 1.0), (False, 2.0), (True, 3.0)):
            saved, filled = state(value), state(0.0)
            with MODES[mode]() if inside else contextlib.nullcontext():
                mapping.copy_in(0, collector.collect(saved))
                collected = collector.collect(filled)
                mapping.copy_out(0, collected, 0, len(collected.layout.items))
            for name, tensor in filled.items():
                assert torch.equal(tensor, saved[name]), (name, value)
        assert opened is staging_mapping


class _Mapping:
    """A mapping that was made inside the mode."""

    def __init__(self, path: Path, mode: Callable[[], AbstractContextManager[object]]) -> None:
        with mode():
            self.mapping = staging.SegmentMapping(str(path))

    def close(self) -> None:
        self.mapping.close()


def test_inference_tensors_are_saved_and_filled(segment: Path, num_threads: int) -> None:
    """Tensors that were made in inference mode are sources and targets, inside the mode and outside of it."""
    with torch.inference_mode():
        saved, filled = state(5.0), state(0.0)
    mapping = staging.SegmentMapping(str(segment))
    with contextlib.closing(mapping):
        mapping.copy_in(0, leaves.Collector().collect(saved))
        collected = leaves.Collector().collect(filled)
        mapping.copy_out(0, collected, 0, len(collected.layout.items))
    for name, tensor in filled.items():
        assert torch.equal(tensor, saved[name]), name


def test_conjugated_and_negated_targets_are_filled_as_copy_does(segment: Path, num_threads: int) -> None:
    """A lazily conjugated or negated view holds the loaded values, as after copy_; of a large one each thread fills a part."""
    for size in (4, LARGE // 4):
        base, values = torch.zeros(size, dtype=torch.complex64), torch.randn(size, dtype=torch.complex64)
        targets = {"conjugated": base.conj(), "negated": torch.zeros(size, dtype=torch.complex64).conj().imag}
        saved = {"conjugated": values, "negated": values.real.clone()}
        mapping = staging.SegmentMapping(str(segment))
        with contextlib.closing(mapping):
            mapping.copy_in(0, leaves.Collector().collect(saved))
            collected = leaves.Collector().collect(targets)
            mapping.copy_out(0, collected, 0, len(collected.layout.items))
        assert torch.equal(targets["conjugated"], values)
        assert torch.equal(base, values.conj())
        assert torch.equal(targets["negated"], values.real)


def test_a_tensor_that_cannot_be_copied_to_is_named(segment: Path, num_threads: int) -> None:
    """torch's own error about a copy comes with the name of the tensor."""
    mapping = staging.SegmentMapping(str(segment))
    with contextlib.closing(mapping):
        mapping.copy_in(0, leaves.Collector().collect({"ok": torch.ones(2), "model.w": torch.ones(9)}))
        collected = leaves.Collector().collect({"ok": torch.zeros(2), "model.w": torch.zeros(1).expand(9)})
        with pytest.raises(IncompatibleCheckpoint, match=r"'model\.w'.*single memory location"):
            mapping.copy_out(0, collected, 0, 2)


def test_the_modes_are_on_again_afterwards() -> None:
    """Behind the block the caller's modes are as they were, in their order, also when it ends by an exception."""
    with torch.inference_mode(), torch.device("meta"), FakeTensorMode() as fake:
        with contextlib.suppress(ZeroDivisionError), modes.off():
            assert not torch.is_inference_mode_enabled()
            assert torch.zeros(1).tolist() == [0.0]
            raise ZeroDivisionError
        assert torch.is_inference_mode_enabled()
        made = torch.zeros(1)
        assert getattr(made, "fake_mode", None) is fake
        assert made.device.type == "meta"
