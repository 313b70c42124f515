"""
The codec for objects of a DCP `StorageWriter`: as JSON they go from one pod's executor to another's, without a pickle.

Called from: `executor.save.dcp_writer`, with several pods only. Pure, and without torch: types of torch are passed in as atoms.
Must never build an object of a class that neither DCP nor the writer's own module defines.

    | value                                  | document                                        |
    |----------------------------------------|-------------------------------------------------|
    | None, bool, int, float, str            | itself                                          |
    | list                                   | a list                                          |
    | tuple, dict, bytes, set, path          | {"=": "tuple", "v": ...} and likewise           |
    | an atom (torch.Size, torch.dtype, ...) | {"=": its tag, "v": ...}                        |
    | dataclass                              | {"=": "object", "c": "module:Class", "v": {...}} |
    | enum                                   | {"=": "enum", "c": "module:Class", "v": name}   |
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import importlib
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

DCP_PACKAGE: Final = "torch.distributed.checkpoint"


class CodecError(TypeError):
    """An object cannot be sent to another pod, or no codec has written a document."""


@dataclass(frozen=True, slots=True)
class Atom:
    """A type whose values are sent as one value of a simpler type."""

    tag: str
    kind: type
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]


_ATOMS: Final = (
    Atom("tuple", tuple, list, tuple),
    Atom("set", set, list, set),
    Atom("frozenset", frozenset, list, frozenset),
    Atom("bytes", bytes, lambda data: base64.b64encode(data).decode(), base64.b64decode),
    Atom("path", pathlib.PosixPath, str, pathlib.Path),
    Atom("pure path", pathlib.PurePosixPath, str, pathlib.PurePosixPath),
    Atom("dict", dict, lambda mapping: [[key, value] for key, value in mapping.items()], dict),
)


class Codec:
    """
    Encodes and decodes the objects of one writer.

    Args:
        writer: name of the writer, for messages.
        module: module whose dataclasses and enums may be sent, besides DCP's.
        atoms: further types.
    """

    def __init__(self, writer: str, module: str, atoms: Sequence[Atom] = ()) -> None:
        self._writer = writer
        self._module = module
        every = (*atoms, *_ATOMS)
        self._by_kind: Mapping[type, Atom] = {atom.kind: atom for atom in every}
        self._by_tag: Mapping[str, Atom] = {atom.tag: atom for atom in every}

    def encode(self, value: object) -> Any:
        """
        Return an object as a document.

        Raises:
            CodecError: the type of an object cannot be sent. Names the type and the writer.
        """
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if isinstance(value, list) and kind is list:
            return [self.encode(each) for each in value]
        atom = self._by_kind.get(kind)
        if atom is not None:
            return {"=": atom.tag, "v": self.encode(atom.encode(value))}
        if isinstance(value, enum.Enum):
            return {"=": "enum", "c": self._name(kind), "v": value.name}
        if dataclasses.is_dataclass(value):
            # A field without a value is left out: the dataclass may set it later.
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
            return {
                "=": "object",
                "c": self._name(kind),
                "v": {name: self.encode(each) for name, each in fields.items()},
            }
        raise CodecError(
            f"{self._writer} hands on a {kind.__module__}.{kind.__qualname__}, which cannot be sent to another pod:"
            " use primitives, lists, tuples, dicts, paths, or dataclasses and enums of the writer's own module"
        )

    def decode(self, document: Any) -> Any:
        """
        Return the object of a document.

        Raises:
            CodecError: the document names a class that may not be sent, or is not a document of this codec.
        """
        if isinstance(document, list):
            return [self.decode(each) for each in document]
        if not isinstance(document, dict):
            return document
        tag = document.get("=")
        atom = self._by_tag.get(tag) if isinstance(tag, str) else None
        if atom is not None:
            return atom.decode(self.decode(document["v"]))
        if tag == "enum":
            return self._class(document["c"])[document["v"]]
        if tag == "object":
            kind = self._class(document["c"])
            made = object.__new__(kind)
            for name, each in document["v"].items():
                # This bypasses a frozen dataclass's guard, and the class's own __init__ (MetadataIndex has one).
                object.__setattr__(made, name, self.decode(each))
            return made
        raise CodecError(f"{self._writer}: the document {document!r:.80} is none of this codec")

    def encode_plan(self, plan: Any, own: Sequence[Any], paths: Mapping[str, Any]) -> dict[str, Any]:
        """
        Return a rank's SavePlan as a document. An item that both pods can make from the rank's layout is sent as its number and its index hint.

        Raises:
            CodecError: the writer has put an object into the plan that cannot be sent.
        """
        places = {item.index: place for place, item in enumerate(own)}
        items: list[Any] = []
        for item in plan.items:
            place = places.get(item.index)
            is_own = place is not None and own[place] == item
            items.append([place, item.index.index] if is_own else {"item": self.encode(item)})
        return {
            "items": items,
            "storage_data": self.encode(plan.storage_data),
            "planner_data": None if plan.planner_data == paths else [self.encode(plan.planner_data)],
            "usable": plan.usable,
        }

    def decode_plan(self, document: Mapping[str, Any], own: Sequence[Any], paths: Mapping[str, Any]) -> dict[str, Any]:
        """
        Return the fields of a SavePlan.

        Raises:
            CodecError, KeyError, TypeError, IndexError: the document is not a plan of this codec.
        """
        items = []
        for entry in document["items"]:
            if isinstance(entry, list):
                item = own[entry[0]]
                items.append(dataclasses.replace(item, index=dataclasses.replace(item.index, index=entry[1])))
            else:
                items.append(self.decode(entry["item"]))
        planner_data = document["planner_data"]
        return {
            "items": items,
            "storage_data": self.decode(document["storage_data"]),
            "planner_data": dict(paths) if planner_data is None else self.decode(planner_data)[0],
            "usable": bool(document["usable"]),
        }

    def _name(self, kind: type) -> str:
        if not self._may_cross(kind.__module__) or "<" in kind.__qualname__:
            raise CodecError(
                f"{self._writer} hands on a {kind.__module__}.{kind.__qualname__}, which cannot be sent to another pod:"
                f" only classes of {DCP_PACKAGE} and of {self._module} can"
            )
        return f"{kind.__module__}:{kind.__qualname__}"

    def _class(self, name: str) -> Any:
        module, _, qualname = name.partition(":")
        if not self._may_cross(module):
            raise CodecError(f"{self._writer}: a class of {module} may not come from another pod")
        attribute: Any = importlib.import_module(module)
        for part in qualname.split("."):
            # A module that this module only imports does not belong to it.
            attribute = (
                None
                if isinstance(attribute, types.ModuleType) and attribute.__name__ != module
                else getattr(attribute, part)
            )
        if not isinstance(attribute, type) or attribute.__module__ != module:
            raise CodecError(f"{self._writer}: {name} is no class")
        if not dataclasses.is_dataclass(attribute) and not issubclass(attribute, enum.Enum):
            raise CodecError(f"{self._writer}: {name} is neither a dataclass nor an enum")
        return attribute

    def _may_cross(self, module: str) -> bool:
        return module == self._module or module == DCP_PACKAGE or module.startswith(DCP_PACKAGE + ".")
