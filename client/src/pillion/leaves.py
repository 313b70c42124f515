"""
A state dict of torch objects as chunks of tensors and opaque leaves.

Called from: `pillion.checkpointer` and `pillion.dcp`, on the training thread. Holds no copy of any data: an item's tensor is a
view of the user's own memory.

A tensor leaf becomes one item for each chunk that this rank holds, whatever it is made of: a plain tensor, a DTensor, a
ShardedTensor, or any tensor that speaks DCP's chunk protocol (`__create_chunk_list__`, `__get_tensor_shard__`). What is no
dense tensor of a known dtype (sparse, quantized, foreign subclasses, any other Python object) becomes opaque bytes that only a
trainer unpickles.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final, cast

import torch

from pillion import flatten
from pillion.errors import IncompatibleCheckpoint, UnsupportedLeaf, UsageError
from pillion.wire import layout

MAX_DIMS: Final = 24
"""Tensors of more dimensions are staged as opaque bytes: their shape would not fit the archive head (layout.HEAD_BYTES)."""

DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    getattr(torch, name): name for name in layout.ITEMSIZE_BYTES if hasattr(torch, name)
}
DTYPES: Final[Mapping[str, torch.dtype]] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer} if hasattr(torch.nn, "Buffer") else ())


@dataclass(frozen=True)
class Leaves:
    """What one rank has to stage (or to fill, at a load)."""

    layout: layout.Layout
    tensors: Sequence[torch.Tensor]
    """One per item of the layout: a view of the user's memory with the item's `sizes`."""
    opaque: Sequence[object]
    """One per opaque leaf."""
    versions: Sequence[int] | None = None
    """In-place version of each tensor when an overlapped save began; None where the copy is done before anything can change."""
    seen: Seen | None = None
    """What a collector remembers of the state dict."""


def materialize(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`Stateful` values (objects with ``state_dict`` and ``load_state_dict``) replaced by what they say; shallow, as DCP."""
    if not isinstance(state_dict, Mapping):
        raise UsageError(f"a state dict must be a mapping, not {type(state_dict).__name__}")
    return {key: value.state_dict() if is_stateful(value) else value for key, value in state_dict.items()}


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """torch's counter of in-place changes; inference tensors have none."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class Collector:
    """
    Turns state dicts into `Leaves`, and remembers the last layout: a state dict of the same shape costs one comparison.

    Not thread-safe; one per Checkpointer.
    """

    def __init__(self) -> None:
        self._seen: Seen | None = None

    def adopt(self, leaves: Leaves) -> None:
        """Remember what another collector saw, so that the first state dict of that shape costs no more than the next."""
        if self._seen is None:
            self._seen = leaves.seen

    def collect(self, state_dict: Mapping[str, Any]) -> Leaves:
        """
        Flatten a materialized state dict.

        Blocks: never (no device synchronisation, no collective).

        Raises:
            UnsupportedLeaf: a leaf that cannot be staged (meta or fake tensors, DTensors with a Partial placement).
            UsageError: two leaves of one name.
        """
        seen = self._seen
        values = seen.shape.leaves(state_dict) if seen is not None else None
        if seen is not None and values is not None:
            known = seen.plain.of(values) if seen.plain is not None else None
            if known is not None:
                return Leaves(seen.layout, *known, seen=seen)
            structure, paths = seen.shape, seen.paths
            flat = dict(zip(paths, values, strict=True))
        else:
            flat, paths = flatten.flatten(state_dict, _is_tensor)
            structure = _Shape(state_dict, set(paths.values()))
        signature: list[object] = []
        tensors: list[torch.Tensor] = []
        opaque: list[object] = []
        opaque_names: list[str] = []
        chunked = False
        for fqn, leaf in flat.items():
            if isinstance(leaf, torch.Tensor) and type(leaf) in _PLAIN:
                dtype = DTYPE_NAMES.get(leaf.dtype)
                if dtype is not None and leaf.layout is torch.strided and not leaf.is_quantized:
                    shape = leaf.shape
                    if len(shape) <= MAX_DIMS:
                        if leaf.is_meta:
                            raise UnsupportedLeaf(fqn=fqn, type_name="meta Tensor", why="it has no data yet")
                        if not hasattr(leaf, "global_offsets"):
                            signature.append((fqn, dtype, shape))
                            tensors.append(leaf)
                            continue
            elif not _is_tensor(leaf):
                signature.append(fqn)
                opaque.append(leaf)
                opaque_names.append(fqn)
                continue
            chunks = _chunks(fqn, leaf)
            if chunks is None:
                signature.append(fqn)
                opaque.append(leaf)
                opaque_names.append(fqn)
            else:
                for item, tensor in chunks:
                    signature.append(item)
                    tensors.append(tensor)
                chunked = True
        # Equal names may have other paths: {"a": [x]} and {"a": {"0": x}}.
        if seen is not None and signature == seen.signature and paths == seen.paths:
            of = seen.layout
        else:
            items = [_item(entry) for entry in signature if not isinstance(entry, str)]
            of = layout.Layout(tuple(items), tuple(opaque_names), paths)
        plain = _PlainTensors(list(flat.values())) if not chunked else None
        if plain is not None and plain.num_tensors != len(tensors):
            plain = None
        self._seen = Seen(signature, of, structure, paths, plain)
        return Leaves(of, tensors, opaque, seen=self._seen)


@dataclass(frozen=True)
class Seen:
    """What a collector remembers of the last state dict."""

    signature: list[object]
    layout: layout.Layout
    shape: _Shape
    paths: dict[str, flatten.Path]
    plain: _PlainTensors | None
    """None where tensors have to be looked at one by one (DTensors, sparse ones)."""


class _Shape:
    """
    The containers of a state dict: their keys, and the type of every value.

    As long as they stay, the leaves are the same ones in the same order, and comparing takes a tenth of flattening.
    """

    def __init__(self, container: Any, leaf_paths: AbstractSet[flatten.Path], path: flatten.Path = ()) -> None:
        self._is_mapping = isinstance(container, Mapping)
        self._keys = tuple(container) if self._is_mapping else ()
        values = list(container.values()) if self._is_mapping else container
        self._types = list(map(type, values))
        self._lists: list[int] = []
        """Lists that are leaves: one that now holds a tensor is a container from now on."""
        self._inner: list[tuple[int, _Shape]] = []
        names: Iterable[str | int] = map(str, self._keys) if self._is_mapping else range(len(values))
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            below: flatten.Path = (*path, name)
            if below not in leaf_paths:
                self._inner.append((index, _Shape(value, leaf_paths, below)))
            elif isinstance(value, list):
                self._lists.append(index)

    def leaves(self, container: Any) -> list[object] | None:
        """The leaves in traversal order; None when something changed."""
        found: list[object] = []
        return found if self._collect(container, found) else None

    def _collect(self, container: Any, found: list[object]) -> bool:
        if self._is_mapping:
            if tuple(container) != self._keys:
                return False
            values = list(container.values())
        else:
            values = container
        if list(map(type, values)) != self._types:
            return False
        for index in self._lists:
            if flatten.flatten({"": values[index]}, _is_tensor)[0].keys() != {""}:
                return False
        done = 0
        for index, inner in self._inner:
            found += values[done:index]
            if not inner._collect(values[index], found):
                return False
            done = index + 1
        found += values[done:]
        return True


class _PlainTensors:
    """What was seen of a state dict whose tensors are all plain ones: enough to know them again without a look at each."""

    def __init__(self, values: list[object]) -> None:
        self._tensors = [index for index, value in enumerate(values) if isinstance(value, torch.Tensor)]
        self._opaque = [index for index, value in enumerate(values) if not isinstance(value, torch.Tensor)]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        self._shapes = [tensor.shape for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]

    @property
    def num_tensors(self) -> int:
        return len(self._tensors)

    def of(self, values: list[object]) -> tuple[list[torch.Tensor], list[object]] | None:
        """Tensors and opaque leaves, of types that were the same before; None when a tensor is of another kind now."""
        tensors = cast("list[torch.Tensor]", [values[index] for index in self._tensors])
        same = (
            [tensor.shape for tensor in tensors] == self._shapes
            and [tensor.dtype for tensor in tensors] == self._dtypes
            and all(tensor.layout is torch.strided for tensor in tensors)
            and not any(tensor.is_meta for tensor in tensors)
            and not any(hasattr(tensor, "global_offsets") for tensor in tensors)
        )
        return (tensors, [values[index] for index in self._opaque]) if same else None


def _item(entry: object) -> layout.Item:
    if isinstance(entry, layout.Item):
        return entry
    fqn, dtype, shape = cast("tuple[str, str, torch.Size]", entry)
    size = tuple(shape)
    return layout.Item(fqn, dtype, size, (0,) * len(size), size)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "local_shards")


def _chunks(fqn: str, leaf: Any) -> list[tuple[layout.Item, torch.Tensor]] | None:
    """The chunks of a leaf that this rank holds; None when it has to be opaque."""
    if _is_fake(leaf) or getattr(leaf, "is_meta", False):
        raise UnsupportedLeaf(fqn=fqn, type_name=f"meta {type(leaf).__name__}", why="it has no data yet")
    dtype = DTYPE_NAMES.get(leaf.dtype)
    if dtype is None:
        return None
    if hasattr(leaf, "placements") and hasattr(leaf, "device_mesh"):
        return _dtensor_chunks(fqn, leaf, dtype)
    if hasattr(leaf, "local_shards") and not isinstance(leaf, torch.nn.Parameter):
        shards = leaf.local_shards()
        if all(hasattr(shard, "metadata") for shard in shards):
            size = tuple(leaf.size())
            found = [
                (tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes), shard.tensor)
                for shard in shards
            ]
            return _items(fqn, dtype, size, found)
    if hasattr(leaf, "__create_chunk_list__"):
        return _protocol_chunks(fqn, leaf, dtype, tuple(leaf.size()))
    if hasattr(leaf, "global_offsets") and hasattr(leaf, "local_sizes"):
        # torch.distributed.checkpoint.CheckpointableTensor (2.14): slices of a plain tensor, named by global offset.
        found = []
        for offsets, local, sizes in zip(leaf.global_offsets, leaf.local_offsets, leaf.local_sizes, strict=True):
            view = torch.Tensor.__getitem__(leaf, tuple(slice(o, o + n) for o, n in zip(local, sizes, strict=True)))
            found.append((tuple(offsets), tuple(sizes), view))
        return _items(fqn, dtype, tuple(leaf.global_shape), found)
    if type(leaf) not in _PLAIN or leaf.layout is not torch.strided or leaf.is_quantized or leaf.dim() > MAX_DIMS:
        return None
    size = tuple(leaf.shape)
    return [(layout.Item(fqn, dtype, size, (0,) * len(size), size), leaf)]


def _dtensor_chunks(fqn: str, leaf: Any, dtype: str) -> list[tuple[layout.Item, torch.Tensor]]:
    if any(placement.is_partial() for placement in leaf.placements):
        raise UnsupportedLeaf(
            fqn=fqn,
            type_name=f"DTensor{tuple(leaf.placements)}",
            why="a Partial placement is a sum that has not been taken; redistribute() it to Replicate or Shard first",
        )
    if leaf.device_mesh.get_coordinate() is None:
        return []
    local = leaf.to_local()
    size = tuple(leaf.size())
    if hasattr(local, "__create_chunk_list__"):
        return _protocol_chunks(fqn, leaf, dtype, size)
    offsets, sizes = _dtensor_extent(size, leaf.device_mesh, tuple(leaf.placements))
    return _items(fqn, dtype, size, [(offsets, sizes, local)])


@functools.lru_cache(maxsize=65536)
def _dtensor_extent(
    size: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of this rank's chunk. Cached: torch takes some 50 us for it, and a model has few distinct ones."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(size, mesh, placements)
    return tuple(offsets), tuple(sizes)


def _protocol_chunks(fqn: str, leaf: Any, dtype: str, size: tuple[int, ...]) -> list[tuple[layout.Item, torch.Tensor]]:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    found = []
    for index, chunk in enumerate(leaf.__create_chunk_list__()):
        tensor = leaf.__get_tensor_shard__(MetadataIndex(fqn, chunk.offsets, index))
        found.append((tuple(chunk.offsets), tuple(chunk.sizes), tensor))
    return _items(fqn, dtype, size, found)


def _items(
    fqn: str, dtype: str, size: tuple[int, ...], found: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]
) -> list[tuple[layout.Item, torch.Tensor]]:
    # An empty shard holds nothing, and its offset lies at the tensor's end: another rank has the data. A tensor that is
    # empty as a whole keeps one empty chunk, or it would be missing from the checkpoint.
    whole_is_empty = 0 in size
    return [
        (layout.Item(fqn, dtype, size, offsets if not whole_is_empty else (0,) * len(size), sizes), tensor)
        for offsets, sizes, tensor in found
        if whole_is_empty or 0 not in sizes
    ]


def _is_fake(leaf: object) -> bool:
    return type(leaf).__name__ == "FakeTensor"


# --- opaque leaves ---------------------------------------------------------------------------------------------------


def pickled(leaf: object, fqn: str) -> bytes:
    """
    A `torch.save` archive of any Python object, as stock DCP writes it.

    Raises:
        UnsupportedLeaf: it cannot be pickled.
    """
    if leaf is None:
        return _pickled_primitive("NoneType", None)
    if isinstance(leaf, (int, bool, str)) and type(leaf) in (int, bool, str):
        return _pickled_primitive(type(leaf).__name__, leaf)
    if type(leaf) is float:
        return _pickled_primitive("float", leaf.hex())
    buffer = io.BytesIO()
    try:
        torch.save(leaf, buffer)
    except Exception as err:  # torch.save raises whatever the object's __reduce__ raises
        raise UnsupportedLeaf(fqn=fqn, type_name=type(leaf).__name__, why=f"it cannot be pickled ({err})") from err
    return buffer.getvalue()


@functools.lru_cache(maxsize=4096)
def _pickled_primitive(kind: str, value: Any) -> bytes:
    # Hyperparameters are most of the opaque leaves, and rarely change; torch.save takes some 100 us for each. Floats are
    # keyed by their hex text: -0.0 == 0.0 and nan != nan would give the wrong bytes.
    buffer = io.BytesIO()
    torch.save(float.fromhex(value) if kind == "float" else value, buffer)
    return buffer.getvalue()


def aligned_estimate(leaf: object) -> int:
    """About how many bytes an opaque leaf takes, without pickling it: the arena is reserved with slack."""
    return 2048 if leaf is None or isinstance(leaf, (int, float, str, bool)) else 16384


def unpickled(data: bytes, fqn: str) -> object:
    """
    The object of an opaque leaf. It runs the trainer's own pickle: only the trainer calls this.

    Raises:
        IncompatibleCheckpoint: its class cannot be imported or built here.
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as err:  # unpickling runs arbitrary constructors
        raise IncompatibleCheckpoint(f"cannot restore {fqn!r}: {type(err).__name__}: {err}", fqns=[fqn]) from err
