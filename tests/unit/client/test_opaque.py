"""
The whole of: leaves of bytes: what is kept of them from save to save, and how the user's own tensors are filled from them.

Called from: pytest.
"""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from pillion import opaque, primitives
from pillion.errors import StagingError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


class Named(torch.Tensor):
    """A Tensor subclass that keeps all it has in its memory, but for what a user hangs on it."""


def named(value: float, **attributes: object) -> torch.Tensor:
    tensor = torch.full((5,), value).as_subclass(Named)
    vars(tensor).update(attributes)
    return tensor


def quantized(seed: int, scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.arange(4.0) * seed, scale, 3, torch.qint8)


def two(a: float, b: float) -> TwoTensor:
    return TwoTensor(torch.full((2,), a), torch.full((2,), b))


def through_bytes(leaf: object) -> Any:
    return opaque.unpickled(opaque.pickled(leaf, "w"), "w")


def compressed(rows: list[int]) -> torch.Tensor:
    return torch.eye(4)[rows].to_sparse_csr()


PAIRS: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]] = {
    "subclass": lambda: (named(0.0), named(7.0)),
    "subclass with equal attributes": lambda: (named(0.0, role="bias"), named(7.0, role="bias")),
    "wrapper": lambda: (two(0.0, 0.0), two(1.0, 2.0)),
    "parameter of a wrapper": lambda: (nn.Parameter(two(0.0, 0.0)), nn.Parameter(two(1.0, 2.0))),
    "wrapper of a wrapper": lambda: (
        TwoTensor(two(0.0, 0.0), torch.zeros(2)),
        TwoTensor(two(1.0, 2.0), torch.full((2,), 3.0)),
    ),
    "sparse": lambda: (torch.ones(4, 4).to_sparse(), torch.eye(4).to_sparse()),
    "compressed": lambda: (compressed([0, 1, 2, 3]), compressed([3, 2, 1, 0])),
    "quantized": lambda: (quantized(0, 1.0), quantized(2, 0.5)),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_a_tensor_is_filled_in_place(kind: str) -> None:
    """The user's own object has the loaded values afterwards, bit for bit, in every tensor that it is made of."""
    target, wanted = PAIRS[kind]()
    assert opaque.fill(target, through_bytes(wanted))
    assert opaque.pickled(target, "w") == opaque.pickled(wanted, "w")


UNEQUAL: dict[str, Callable[[], tuple[object, object]]] = {
    "attribute": lambda: (named(0.0), named(7.0, scale=2.0)),
    "tensor attribute": lambda: (named(0.0, scale=torch.ones(1)), named(7.0, scale=torch.zeros(1))),
    "shape": lambda: (named(0.0)[:3], named(7.0)),
    "dtype": lambda: (torch.zeros(4, 4).to_sparse(), torch.eye(4).double().to_sparse()),
    "elements": lambda: (torch.ones(4, 4).to_sparse_csr(), compressed([0, 1, 2, 3])),
    "type": lambda: (two(0.0, 0.0), torch.ones(2)),
    "inner": lambda: (two(0.0, 0.0), TwoTensor(torch.ones(2).double(), torch.ones(2).double())),
    "objects": lambda: (3, 4),
    "none": lambda: (torch.eye(2).to_sparse(), None),
}


@pytest.mark.parametrize("kind", UNEQUAL)
def test_what_does_not_agree_is_left_alone(kind: str) -> None:
    """A pair of other types, shapes, dtypes or attributes is not filled: the loaded object takes the place of the other."""
    target, loaded = UNEQUAL[kind]()
    before = opaque.pickled(target, "w")
    assert not opaque.fill(target, loaded)
    assert opaque.pickled(target, "w") == before


def test_an_inference_tensor_is_filled_too() -> None:
    """A wrapper made in inference mode is filled outside of it, and an ordinary one within."""
    with torch.inference_mode():
        inference = TwoTensor(torch.zeros(2), torch.zeros(2))
        ordinary = TwoTensor(torch.zeros(2), torch.zeros(2))
        assert opaque.fill(ordinary, TwoTensor(torch.ones(2), torch.ones(2)))
    with torch.inference_mode(False):
        assert opaque.fill(inference, TwoTensor(torch.ones(2), torch.ones(2)))
    assert inference.a.tolist() == ordinary.a.tolist() == [1.0, 1.0]


def test_primitives_that_stay_are_archived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second save of thousands of unchanged numbers makes no archive, and of changed ones only theirs."""
    pickler = opaque.Pickler()
    state: dict[str, object] = {f"offset.{i}": i for i in range(6000)} | {"zero": -0.0, "none": None, "flag": True}
    made: list[object] = []

    def archive(leaf: object) -> bytes:
        made.append(leaf)
        return repr(leaf).encode()

    monkeypatch.setattr(primitives, "archive", archive)
    first = pickler.pickled(state)
    assert len(made) == len(state)
    assert pickler.pickled(state) == first
    assert len(made) == len(state)
    assert pickler.pickled({**state, "zero": 0.0, "flag": 1})[-3:] == [b"0.0", b"None", b"1"]
    assert list(map(repr, made[len(state) :])) == ["0.0", "1"]


def test_a_long_text_is_not_kept() -> None:
    """A log that grows from save to save is pickled each time, and no earlier one stays in memory."""
    pickler = opaque.Pickler()
    for size in (10_000, 20_000):
        (archive,) = pickler.pickled({"log": "x" * size})
        assert len(torch.load(io.BytesIO(archive))) == size
    assert not pickler._kept


class Endless:
    """Its pickle finds no memory, as `ulimit -v` has it."""

    def __reduce__(self) -> tuple[object, ...]:
        raise MemoryError


def test_no_memory_to_pickle_in_is_said_as_that() -> None:
    """The object is as good as another: the error names it, and does not call it one that cannot be pickled."""
    with pytest.raises(StagingError, match=r"out of memory while pickling 'of\.it' of type Endless"):
        opaque.pickled(Endless(), "of.it")
