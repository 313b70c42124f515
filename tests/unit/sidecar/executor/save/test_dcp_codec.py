"""
The whole of: what of a writer crosses between pods, and that nothing else does.

Called from: pytest.
Must never: start a process.
"""

import dataclasses
import enum
import json
import os
import pathlib
import threading
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from pillion.wire import layout
from pillion_sidecar.executor.save import dcp_codec, dcp_planner, dcp_writer


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Place:
    path: pathlib.Path
    part: tuple[int, ...]
    colour: Colour = Colour.RED


CODEC = dcp_codec.Codec(f"{__name__}:Writer", __name__, dcp_writer.ATOMS)


def crossed(value: object) -> Any:
    return CODEC.decode(json.loads(json.dumps(CODEC.encode(value))))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        1.5,
        "text",
        [1, [2, (3, "x")], None],
        (),
        {"a": 1, 2: (3,), (4, 5): {"=": "tuple", "v": [1]}},
        {"=": "object"},
        b"\0bytes",
        {1, 2},
        frozenset({"x"}),
        pathlib.Path("a/b"),
        pathlib.PurePosixPath("c"),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.strided,
        torch.contiguous_format,
        Colour.RED,
        Place(pathlib.Path("x"), (1, 2)),
        _StoragePrefix("__3_"),
        WriteResult(MetadataIndex("w", [0, 4], 2), 10, _StorageInfo("__0_0.distcp", 5, 6)),
    ],
    ids=repr,
)
def test_what_a_writer_may_hand_on_crosses_unchanged(value: object) -> None:
    """Primitives, containers, paths, torch's small types, and classes of DCP and of the writer's module come out equal."""
    back = crossed(value)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("value", [threading.Lock(), torch.ones(1), object, {"x": [object()]}, os])
def test_anything_else_is_refused_by_name(value: object) -> None:
    """An object of another kind is an error that names its type and the writer, wherever it lies."""
    with pytest.raises(dcp_codec.CodecError, match=f"^{__name__}:Writer hands on a "):
        CODEC.encode(value)


def test_a_dataclass_of_another_module_is_refused() -> None:
    """A dataclass that neither DCP nor the writer's module defines does not cross, in either direction."""
    stranger = layout.Item("w", "float32", (1,), (0,), (1,))
    with pytest.raises(dcp_codec.CodecError, match="Item"):
        CODEC.encode(stranger)
    with pytest.raises(dcp_codec.CodecError, match="may not come"):
        CODEC.decode({"=": "object", "c": "pillion.wire.layout:Item", "v": {}})


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:Popen",
        "torch.distributed.checkpoint.filesystem:os.path",
        "torch.distributed.checkpoint.filesystem:FileSystemWriter",
        "torch.distributed.checkpoint.filesystem:pickle.Unpickler",
        f"{__name__}:crossed",
    ],
)
def test_a_document_builds_no_object_of_any_other_class(name: str) -> None:
    """A document that names a function, a plain class, or something that a module only imports is refused."""
    with pytest.raises(dcp_codec.CodecError):
        CODEC.decode({"=": "object", "c": name, "v": {}})


def test_a_plan_crosses_by_the_numbers_of_its_items() -> None:
    """What both sides can make from the layout is sent as a number and its hint; what a writer changed is sent whole."""
    of = layout.Layout(
        (
            layout.Item("w", "float32", (4, 2), (2, 0), (2, 2)),
            layout.Item("b", "bfloat16", (), (), ()),
        ),
        ("step",),
        {"w": ("w",), "b": ("b",), "step": ("step",)},
    )
    own = dcp_planner.write_items(of, [7])
    hinted = dataclasses.replace(own[0], index=dataclasses.replace(own[0].index, index=5))
    changed = dataclasses.replace(own[1], tensor_data=None)
    plan = SavePlan([hinted, changed, own[2]], storage_data=_StoragePrefix("__0_"), planner_data=dict(of.paths))
    document = json.loads(json.dumps(CODEC.encode_plan(plan, own, of.paths)))
    assert document["items"][0] == [0, 5]
    assert document["items"][2] == [2, None]
    assert document["planner_data"] is None
    back = SavePlan(**CODEC.decode_plan(document, own, of.paths))
    assert back == plan
    assert back.items[0].index.index == 5
