"""
The whole of: the kinds of values that state dicts hold, saved by us and loaded by us and by stock DCP.

Called from: pytest.
Must never: compare a value with itself; what is loaded into differs from what was saved.
"""

import collections
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.testing._internal.two_tensor import TwoTensor

from pillion.errors import IncompatibleCheckpoint, UnsupportedLeaf, UsageError
from process.ranks import Ranks
from support.deadlines import Deadline

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


class Named(torch.Tensor):
    """A Tensor subclass that keeps all it has in its memory."""


class Counter:
    """A Stateful of a user: what it says at a save is given back to it at a load."""

    def __init__(self, seen: int) -> None:
        self.seen = seen
        self.window = torch.full((5,), float(seen))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.window = state["seen"], state["window"].clone()


def tensors(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(64, 48, generator=generator)
    whole = torch.randn(1000, generator=generator)
    return {
        "dtypes": {str(dtype): torch.randint(0, 2, (7, 3), generator=generator).to(dtype) for dtype in DTYPES},
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 5),
        "transposed": base.t(),
        "strided": base[::2, 5:40:3],
        "first half": whole[:500],
        "overlapping": whole[250:750],
        "expanded": torch.tensor([float(seed)]).expand(9),
        "parameter": torch.nn.Parameter(base[:3].clone()),
        "channels": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "many dims": torch.randn([1] * 20 + [3], generator=generator),
    }


def objects(seed: int) -> dict[str, Any]:
    return {
        "int": seed,
        "float": -0.0 if seed else 1.5,
        "nan": float("nan") if seed else 0.0,
        "none": None,
        "text": f"seed {seed}",
        "bytes": b"\0" * seed,
        "tuple": (seed, "x", (torch.tensor(seed),)),
        "plain list": [seed, seed + 1],
        "ordered": collections.OrderedDict(a=seed, b=[seed]),
        "set": {seed},
        "file": io.BytesIO(bytes([seed % 256]) * 100),
        "sparse": torch.eye(4).mul(seed + 1).to_sparse(),
        "list of tensors": [torch.tensor([seed]), {"deep": [torch.tensor([seed + 1]), seed]}],
        "param_groups": [{"lr": 0.1 * seed, "betas": (0.9, 0.99), "params": [0, 1]}],
        "state": {0: {"exp_avg": torch.full((3,), float(seed))}, 1: {"step": torch.tensor(float(seed))}},
        "": {"": torch.tensor(seed)},
    }


def assert_same(found: Any, wanted: Any, path: str = "") -> None:
    """Equal in kind, dtype, shape and value, bit for bit."""
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape, found.layout) == (wanted.dtype, wanted.shape, wanted.layout), path
        if wanted.layout is not torch.strided:
            found, wanted = found.to_dense(), wanted.to_dense()
        ours, theirs = (each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (found, wanted))
        assert torch.equal(ours, theirs), path
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            assert_same(found[key], wanted[key], f"{path}.{key}")
    elif isinstance(wanted, (list, tuple)):
        assert type(found) is type(wanted), path
        assert len(found) == len(wanted), path
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif isinstance(wanted, io.BytesIO):
        assert found.getvalue() == wanted.getvalue(), path
    else:
        assert type(found) is type(wanted), path
        assert repr(found) == repr(wanted), path


def test_every_kind_of_tensor_is_saved_and_loaded_by_us_and_by_stock(ranks: Ranks, tmp_path: Path) -> None:
    """All dtypes, views, shared storages, strides, scalars and empty tensors come back bit for bit, in place."""
    saved = tensors(1)
    opened = ranks.open(tmp_path)
    where = opened.save(saved, 1).result(Deadline.COMMITTED.s).path
    ours, stock = _blank(tensors(2)), _blank(tensors(2))
    addresses = {name: value.data_ptr() for name, value in ours.items() if isinstance(value, torch.Tensor)}
    assert opened.load(ours) == 1
    assert_same(ours, saved)
    assert addresses == {name: value.data_ptr() for name, value in ours.items() if isinstance(value, torch.Tensor)}
    dcp.load(stock, checkpoint_id=where)
    assert_same(stock, saved)


def test_every_kind_of_object_is_saved_and_loaded_by_us_and_by_stock(ranks: Ranks, tmp_path: Path) -> None:
    """Numbers to the bit, containers of any depth, int keys, buffers and sparse tensors come back as what they were."""
    saved = {**objects(3), "counter": Counter(3)}
    opened = ranks.open(tmp_path)
    where = opened.save(saved, 1).result(Deadline.COMMITTED.s).path
    for by_us in (True, False):
        counter = Counter(0)
        found = {**objects(0), "counter": counter}
        if by_us:
            assert opened.load(found) == 1
        else:
            dcp.load(found, checkpoint_id=where)
        assert found.pop("counter") is counter
        assert (counter.seen, counter.window.tolist()) == (3, [3.0] * 5)
        assert_same(found, objects(3))


def test_tensors_of_every_kind_are_filled_in_place(ranks: Ranks, tmp_path: Path) -> None:
    """Subclasses, sparse tensors and packed dtypes keep their object, also within inference mode; stock reads what it can."""
    newest = getattr(torch, "float4_e2m1fn_x2", torch.float8_e5m2)  # float4 came after torch 2.6
    packed = torch.full((8,), 0x21, dtype=torch.uint8).view(newest)

    def make(value: float) -> dict[str, Any]:
        return {
            "role": type("Role", (torch.nn.Parameter,), {})(torch.full((3,), value)),
            "packed": packed.clone() if value else torch.zeros_like(packed.view(torch.uint8)).view(packed.dtype),
            "conjugated": torch.full((4,), complex(0, value)).conj(),
            "named": torch.full((5,), value).as_subclass(Named),
            "two": TwoTensor(torch.full((2,), value), torch.full((2,), value + 1)),
            "sparse": torch.eye(3).mul(value + 1).to_sparse(),
        }

    def plain(state: dict[str, Any]) -> dict[str, Any]:
        return {
            "role": state["role"].tolist(),
            "packed": state["packed"].view(torch.uint8).tolist(),
            "conjugated": state["conjugated"].tolist(),
            "named": state["named"].tolist(),
            "two": (state["two"].a.tolist(), state["two"].b.tolist()),
            "sparse": state["sparse"].to_dense().tolist(),
        }

    opened = ranks.open(tmp_path)
    with torch.inference_mode():
        where = opened.save(make(7.0), 1).result(Deadline.COMMITTED.s).path
        inside = make(0.0)
    outside = make(0.0)
    for found in (inside, outside):
        kept = dict(found)
        assert opened.load(found) == 1
        assert all(found[name] is kept[name] for name in kept)
        assert plain(found) == plain(make(7.0))
    opened.save(make(8.0), 2).result(Deadline.COMMITTED.s)
    stock = {name: value for name, value in make(0.0).items() if name in ("role", "packed", "conjugated")}
    dcp.load(stock, checkpoint_id=where)
    assert stock["role"].tolist() == [7.0] * 3
    assert stock["packed"].view(torch.uint8).tolist() == [0x21] * 8
    assert stock["conjugated"].tolist() == make(7.0)["conjugated"].tolist()


def test_what_stock_saved_is_loaded(ranks: Ranks, tmp_path: Path) -> None:
    """A step directory that stock dcp.save wrote is a checkpoint like any other, named by its directory."""
    saved = {**tensors(5), **objects(5), "counter": Counter(5)}
    del saved["sparse"]  # stock cannot save it
    dcp.save(copy.copy(saved), checkpoint_id=tmp_path / "step-40")
    opened = ranks.open(tmp_path)
    counter = Counter(0)
    blank = {**_blank(tensors(6)), **objects(0), "counter": counter}
    found = {name: blank[name] for name in saved}
    assert opened.load(found) == 40
    assert counter.seen == 5
    for name, value in {**tensors(5), **objects(5)}.items():
        if name in found:
            assert_same(found[name], value, name)
    opened.save({"weight": torch.ones(3)}, 41).result(Deadline.COMMITTED.s)
    newest = opened.latest()
    assert newest is not None
    assert newest.step == 41


def test_another_dtype_is_converted_as_stock_does(ranks: Ranks, tmp_path: Path) -> None:
    """A float32 tensor loaded into a bfloat16 one is converted, as dcp.load does it."""
    opened = ranks.open(tmp_path)
    saved = {"weight": torch.randn(100), "other": torch.arange(10)}
    opened.save(saved, 1).result(Deadline.COMMITTED.s)
    found = {"weight": torch.zeros(100, dtype=torch.bfloat16), "other": torch.zeros(10, dtype=torch.int64)}
    opened.load(found)
    assert torch.equal(found["weight"], saved["weight"].bfloat16())
    assert torch.equal(found["other"], saved["other"])


def test_a_part_of_a_checkpoint_can_be_loaded(ranks: Ranks, tmp_path: Path) -> None:
    """A state dict with fewer keys than the checkpoint takes what it asks for."""
    opened = ranks.open(tmp_path)
    opened.save({"model": {"a": torch.ones(3), "b": torch.ones(4)}, "step": 9}, 1).result(Deadline.COMMITTED.s)
    found: dict[str, Any] = {"model": {"b": torch.zeros(4)}}
    assert opened.load(found) == 1
    assert torch.equal(found["model"]["b"], torch.ones(4))


def test_a_state_dict_that_does_not_fit_is_refused_with_every_name(ranks: Ranks, tmp_path: Path) -> None:
    """Missing keys, other shapes and other kinds are all named in one error, and nothing of the state was changed."""
    opened = ranks.open(tmp_path)
    opened.save({"a": torch.ones(3), "b": torch.ones(4), "c": 1}, 1).result(Deadline.COMMITTED.s)
    found: dict[str, Any] = {"a": torch.zeros(5), "b": torch.zeros(4), "c": torch.zeros(1), "d": torch.zeros(2), "e": 0}
    with pytest.raises(IncompatibleCheckpoint) as caught:
        opened.load(found)
    assert sorted(caught.value.fqns) == ["a", "c", "d", "e"]
    assert float(found["b"].sum()) == 0
    opened.save({"a": torch.ones(3)}, 2).result(Deadline.COMMITTED.s)


@pytest.mark.parametrize(
    ("fqn", "leaf"),
    [
        ("model.meta", torch.empty(3, device="meta")),
        ("model.closure", lambda: None),
        ("model.lock", __import__("threading").Lock()),
    ],
    ids=["meta", "closure", "lock"],
)
def test_a_leaf_that_cannot_be_saved_fails_its_save_by_name_and_no_other(
    ranks: Ranks, tmp_path: Path, fqn: str, leaf: object
) -> None:
    """The handle holds UnsupportedLeaf with the name; nothing is on storage, and the next save is committed."""
    opened = ranks.open(tmp_path)
    handle = opened.save({"model": {"ok": torch.ones(3), fqn.split(".")[1]: leaf}}, 1)
    error = handle.committed.exception(Deadline.REPLY.s)
    assert isinstance(error, UnsupportedLeaf)
    assert error.fqn == fqn
    assert not list(tmp_path.glob("step-*"))
    opened.save({"model": {"ok": torch.ones(3)}}, 2).result(Deadline.COMMITTED.s)


def test_two_values_of_one_name_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """A flat key and a nested one that give the same FQN are an error that names both, not a lost value."""
    opened = ranks.open(tmp_path)
    error = opened.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, 1).committed.exception(Deadline.REPLY.s)
    assert isinstance(error, UsageError)
    assert "'a.b'" in str(error)


def test_an_object_whose_class_is_gone_fails_the_load_and_not_the_saves_after_it(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load names the leaf; the slots that it held are free again for the saves that follow."""
    import sys
    import types

    module = types.ModuleType("a_module_of_the_user")
    exec("class Config:\n    pass\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "a_module_of_the_user", module)
    opened = ranks.open(tmp_path)
    opened.save({"config": module.Config(), "weight": torch.ones(3)}, 1).result(Deadline.COMMITTED.s)
    monkeypatch.delitem(sys.modules, "a_module_of_the_user")
    with pytest.raises(IncompatibleCheckpoint, match="config"):
        opened.load({"config": None, "weight": torch.zeros(3)})
    for step in (2, 3, 4):
        opened.save({"weight": torch.ones(3)}, step).result(Deadline.COMMITTED.s)


def _blank(state: dict[str, Any]) -> dict[str, Any]:
    """The same shapes with other values, each tensor in memory of its own."""
    return {
        key: _blank(value)
        if isinstance(value, dict)
        else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).zero_()
        if 0 not in value.stride() or value.numel() < 2
        else torch.zeros_like(value, memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
