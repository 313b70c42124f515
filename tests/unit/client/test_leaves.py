"""
The whole of: what a collector takes for a tensor, what for bytes, and what it refuses, each by its name.

Called from: pytest.
Must never: need a sidecar, or a process group.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from pillion import leaves
from pillion.errors import IncompatibleCheckpoint, UnsupportedLeaf
from pillion.wire import layout
from pillion_sidecar.storage import archive

pytestmark = [
    pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support is experimental"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]


class Role(nn.Parameter):
    """A Parameter subclass, as inference engines have them: memory with a role."""


class Named(torch.Tensor):
    """A Tensor subclass without a dispatch of its own."""


class Sharded:
    """A ShardedTensor's interface to DCP: its size, and any number of local shards."""

    dtype = torch.float32

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.shards = [
            SimpleNamespace(
                metadata=SimpleNamespace(shard_offsets=[int(row[1:]), 0], shard_sizes=[1, 3]), tensor=tensor
            )
            for row, tensor in tensors.items()
        ]

    def size(self) -> torch.Size:
        return torch.Size((4, 3))

    def local_shards(self) -> list[SimpleNamespace]:
        return self.shards


def collect(**state: Any) -> leaves.Leaves:
    return leaves.Collector().collect(state)


def fakes() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(1, 3)


def test_the_dtypes_of_layout_and_archive_are_the_same() -> None:
    """What the trainer stages as a tensor is what the sidecar can frame as one, with the same item size, torch's own."""
    assert dict(layout.ITEMSIZE_BYTES) == dict(archive.SUPPORTED_DTYPES)
    for name, dtype in leaves.DTYPES.items():
        assert torch.empty(1, dtype=dtype).element_size() == layout.ITEMSIZE_BYTES[name]


def test_a_subclass_of_parameter_is_a_tensor() -> None:
    """A Parameter subclass is staged as its memory, and a load of the same state dict fills that memory."""
    role = Role(torch.zeros(3))
    vars(role).update(output_dim=0, shape_before=(3, 1), weight_loader=role.copy_, scale=None)
    collected = collect(role=role)
    assert [item.fqn for item in collected.layout.items] == ["role"]
    with torch.no_grad():
        collected.tensors[0].fill_(7)
    assert role.tolist() == [7.0] * 3


def test_a_parameter_that_keeps_state_in_attributes_is_opaque() -> None:
    """A quantized weight whose scales lie beside its memory is saved whole; its bytes alone would be another weight."""
    for state in (torch.ones(1), SimpleNamespace(absmax=torch.ones(1)), [torch.ones(1)], nn.Linear(1, 1)):
        weight = Role(torch.zeros(3))
        vars(weight)["quant_state"] = state
        assert collect(weight=weight).layout.opaque == ("weight",)


def test_a_subclass_of_tensor_is_opaque_and_keeps_its_type() -> None:
    """A Tensor subclass, a wrapper of two tensors, and a nested tensor are leaves of bytes."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    collected = collect(
        named=torch.zeros(3).as_subclass(Named), two=TwoTensor(torch.ones(2), torch.ones(2)), nested=nested
    )
    assert collected.layout.opaque == ("named", "two", "nested")


@pytest.mark.parametrize("rows", [(), (1,), (0, 3)])
def test_a_sharded_tensor_has_any_number_of_local_shards(rows: tuple[int, ...]) -> None:
    """Each local shard of a ShardedTensor is an item at its own offset; a rank without any holds none."""
    collected = collect(
        table=Sharded(**{f"r{row}": torch.full((1, 3), float(row)) for row in rows}), step=torch.zeros(1)
    )
    assert [item.offsets for item in collected.layout.items if item.fqn == "table"] == [(row, 0) for row in rows]
    assert [tensor.tolist() for tensor in collected.tensors[:-1]] == [[[float(row)] * 3] for row in rows]


def test_a_shard_that_is_no_dense_tensor_is_refused_by_name() -> None:
    """Shards that wrap other tensors would be written once for all ranks, so the leaf is refused, with what to do."""
    inner = torch.ones(1, 3)
    with pytest.raises(UnsupportedLeaf, match=r"'state\.exp_avg'.*__tensor_flatten__") as caught:
        collect(state={"exp_avg": Sharded(r0=inner, r2=TwoTensor(inner, inner))})
    assert caught.value.fqn == "state.exp_avg"
    for shard in (
        torch.ones(1, 3).to_sparse(),
        torch.empty(1, 3, device="meta"),
        fakes(),
        torch.ones(3),
        inner.double(),
    ):
        with pytest.raises(UnsupportedLeaf, match="'w'"):
            collect(w=Sharded(r0=shard))


@pytest.mark.parametrize(
    "leaf",
    [
        torch.empty(3, device="meta"),
        fakes(),
        TwoTensor(torch.empty(2, device="meta"), torch.empty(2, device="meta")),
        nn.UninitializedParameter(),
    ],
    ids=["meta", "fake", "wrapper of meta", "uninitialized"],
)
def test_a_tensor_without_data_is_refused_by_name(leaf: torch.Tensor) -> None:
    """A tensor that has no values yet is neither saved nor a target, wherever the missing values should lie."""
    with pytest.raises(UnsupportedLeaf, match=r"'model\.w'"):
        collect(model={"w": leaf})


def test_a_tensor_within_a_transform_is_refused_by_name() -> None:
    """Under torch.func.vmap a tensor stands for a batch and has no memory of its own, also where the layout is known."""
    collector = leaves.Collector()
    collector.collect({"w": torch.zeros(3)})

    def inside(row: torch.Tensor) -> torch.Tensor:
        with pytest.raises(UnsupportedLeaf, match="'w'"):
            collector.collect({"w": row})
        return row

    torch.func.vmap(inside)(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("target", "fits"),
    [
        (torch.zeros(1).expand(9), False),
        (torch.zeros(3, 1).expand(3, 2), False),
        (torch.zeros(5).as_strided((3, 3), (1, 1)), False),
        (torch.zeros(10).unfold(0, 3, 1), False),
        (torch.zeros(20)[::2], True),
        (torch.zeros(4, 6)[1:3, ::3], True),
        (torch.zeros(4, 6).t(), True),
        (torch.zeros(1).expand(1), True),
        (torch.zeros(0, 5).expand(0, 5), True),
        (torch.tensor(1.0), True),
    ],
)
def test_a_target_whose_elements_share_memory_is_refused_before_it_is_filled(target: torch.Tensor, fits: bool) -> None:
    """Tensors that were expanded, or whose windows overlap, cannot hold a value for each element; views that do not can."""
    collected = collect(ok=torch.zeros(2), w=target)
    if fits:
        leaves.check_fillable(collected)
        return
    with pytest.raises(IncompatibleCheckpoint, match="'w'") as caught:
        leaves.check_fillable(collected)
    assert caught.value.fqns == ("w",)
