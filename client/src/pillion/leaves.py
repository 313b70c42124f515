"""
A state dict of torch objects as chunks of tensors and opaque leaves.

Called from: `pillion.checkpointer` and `pillion.dcp`, on the training thread. Holds no copy of any data: an item's tensor is a
view of the user's own memory.

A tensor leaf becomes one item for each chunk that this rank holds. It may be a plain tensor, a DTensor, a ShardedTensor, or any
tensor with DCP's chunk protocol (`__create_chunk_list__`, `__get_tensor_shard__`). Every other leaf (sparse and quantized tensors,
foreign subclasses, any other Python object) becomes opaque bytes that only a trainer unpickles (`pillion.opaque`).

A shard that is not plain bytes in memory is refused. An opaque leaf is written once for all ranks that have its name, so a shard cannot
be one.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final, cast

import torch

from pillion import flatten, modes, stateful
from pillion.errors import IncompatibleCheckpoint, UnsupportedLeaf, UsageError
from pillion.wire import layout as layout_module

MAX_DIMS: Final = 24
"""Maximum dimensions of a tensor item. The shape of a larger one does not fit the archive head (layout.HEAD_BYTES); it is opaque."""

DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    getattr(torch, name): name for name in layout_module.ITEMSIZE_BYTES if hasattr(torch, name)
}
DTYPES: Final[Mapping[str, torch.dtype]] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
_USES: Final = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Types of attributes that describe the use of a tensor and hold none of its values."""


@dataclass(frozen=True)
class Leaves:
    """The leaves that one rank stages, or that a load fills."""

    layout: layout_module.Layout
    tensors: Sequence[torch.Tensor]
    """One per item of the layout: a view of the user's memory with the item's `sizes`."""
    opaque: Sequence[object]
    """One per opaque leaf."""
    seen: Seen | None = None
    """What a collector remembers of this state dict."""


def materialize(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `Stateful` values (objects with ``state_dict`` and ``load_state_dict``) by their state dicts. Shallow, as in DCP."""
    if not isinstance(state_dict, Mapping):
        raise UsageError(f"a state dict must be a mapping, not {type(state_dict).__name__}")
    return {key: value.state_dict() if stateful.is_stateful(value) else value for key, value in state_dict.items()}


@modes.off()
def empty(item: layout_module.Item) -> torch.Tensor:
    """
    Return a new tensor on the CPU that an item of a checkpoint fills. Its values are undefined.

    Raises:
        IncompatibleCheckpoint: this torch does not have the dtype.
    """
    dtype = DTYPES.get(item.dtype)
    if dtype is None:
        raise IncompatibleCheckpoint(
            f"{item.fqn!r} has the dtype {item.dtype}, which torch {torch.__version__} does not have", fqns=[item.fqn]
        )
    return torch.empty(item.sizes, dtype=dtype, device="cpu")


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return torch's counters of in-place changes. Inference tensors have none and count as 0."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class Collector:
    """
    Turns state dicts into `Leaves`. It remembers the last layout, so a state dict of the same shape costs one comparison.

    Not thread-safe; one per Checkpointer.
    """

    def __init__(self) -> None:
        self._seen: Seen | None = None

    def adopt(self, leaves: Leaves) -> None:
        """Take over the layout that another collector saw, so that already the first state dict of that shape is cheap."""
        if self._seen is None:
            self._seen = leaves.seen

    @modes.off()
    def collect(self, state_dict: Mapping[str, Any]) -> Leaves:
        """
        Flatten a materialized state dict.

        Blocks: for a collective that an asynchronous redistribute of a DTensor has begun. Otherwise never: it synchronizes no device.

        Raises:
            UnsupportedLeaf: a leaf cannot be staged (meta or fake tensors, DTensors with a Partial placement or with shards that
                are not dense tensors).
            UsageError: two leaves have one name.
        """
        transforming = _transforming()
        seen = self._seen if not transforming else None
        values = seen.shape.leaves(state_dict) if seen is not None else None
        if seen is not None and values is not None:
            unchanged = seen.plain.matching(values) if seen.plain is not None else None
            if unchanged is not None:
                return Leaves(seen.layout, *unchanged, seen=seen)
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
                if dtype is not None and _is_dense(leaf) and leaf.dim() <= MAX_DIMS:
                    if leaf.is_meta or transforming:
                        _check_data(fqn, leaf)
                    if not hasattr(leaf, "global_offsets"):
                        signature.append((fqn, dtype, leaf.shape))
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
        # Equal names may have different paths: {"a": [x]} and {"a": {"0": x}}.
        if seen is not None and signature == seen.signature and paths == seen.paths:
            layout = seen.layout
        else:
            items = [_item(entry) for entry in signature if not isinstance(entry, str)]
            layout = layout_module.Layout(tuple(items), tuple(opaque_names), paths)
        values = list(flat.values())
        all_plain = not chunked and sum(isinstance(value, torch.Tensor) for value in values) == len(tensors)
        plain = _PlainTensors(values) if all_plain else None
        self._seen = Seen(signature, layout, structure, paths, plain)
        return Leaves(layout, tensors, opaque, seen=self._seen)


@dataclass(frozen=True)
class Seen:
    """What a collector remembers of the last state dict."""

    signature: list[object]
    layout: layout_module.Layout
    shape: _Shape
    paths: dict[str, flatten.Path]
    plain: _PlainTensors | None
    """None if every tensor must be checked by itself (DTensors, sparse tensors)."""


class _Shape:
    """
    The containers of a state dict: their keys, and the type of every value.

    While these stay the same, the leaves keep their order. A comparison takes a tenth of the time of flattening.
    """

    def __init__(self, container: Any, leaf_paths: AbstractSet[flatten.Path], path: flatten.Path = ()) -> None:
        self._is_mapping = isinstance(container, Mapping)
        self._keys = tuple(container) if self._is_mapping else ()
        values = list(container.values()) if self._is_mapping else container
        self._types = list(map(type, values))
        self._lists: list[int] = []
        """Indexes of lists that are leaves. A list that now holds a tensor would be a container."""
        self._inner: list[tuple[int, _Shape]] = []
        names: Iterable[str | int] = map(str, self._keys) if self._is_mapping else range(len(values))
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            below: flatten.Path = (*path, name)
            if below not in leaf_paths:
                self._inner.append((index, _Shape(value, leaf_paths, below)))
            elif isinstance(value, list):
                self._lists.append(index)

    def leaves(self, container: Any) -> list[object] | None:
        """Return the leaves in traversal order. None if a key, a type or a container changed."""
        leaves: list[object] = []
        return leaves if self._collect(container, leaves) else None

    def _collect(self, container: Any, leaves: list[object]) -> bool:
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
            leaves += values[done:index]
            if not inner._collect(values[index], leaves):
                return False
            done = index + 1
        leaves += values[done:]
        return True


class _PlainTensors:
    """Shapes and dtypes of a state dict with plain tensors only. They suffice to recognize the next one without a check of each tensor."""

    def __init__(self, values: list[object]) -> None:
        self._tensors = [index for index, value in enumerate(values) if isinstance(value, torch.Tensor)]
        self._opaque = [index for index, value in enumerate(values) if not isinstance(value, torch.Tensor)]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        self._shapes = [tensor.shape for tensor in tensors]
        self._dtypes = [tensor.dtype for tensor in tensors]

    def matching(self, values: list[object]) -> tuple[list[torch.Tensor], list[object]] | None:
        """Return the tensors and opaque leaves among `values`, whose types are the same as before. None if a tensor changed its kind."""
        tensors = cast("list[torch.Tensor]", [values[index] for index in self._tensors])
        same = (
            not any(tensor.is_nested for tensor in tensors)  # which have no shape
            and [tensor.shape for tensor in tensors] == self._shapes
            and [tensor.dtype for tensor in tensors] == self._dtypes
            and all(tensor.layout is torch.strided for tensor in tensors)
            and not any(tensor.is_meta for tensor in tensors)
            and not any(hasattr(tensor, "global_offsets") for tensor in tensors)
        )
        return (tensors, [values[index] for index in self._opaque]) if same else None


def _item(entry: object) -> layout_module.Item:
    if isinstance(entry, layout_module.Item):
        return entry
    fqn, dtype, shape = cast("tuple[str, str, torch.Size]", entry)
    size = tuple(shape)
    return layout_module.Item(fqn, dtype, size, (0,) * len(size), size)


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "local_shards")


def _chunks(fqn: str, leaf: Any) -> list[tuple[layout_module.Item, torch.Tensor]] | None:
    """Return the chunks of a leaf that this rank holds. None if the leaf must be opaque."""
    if hasattr(leaf, "placements") and hasattr(leaf, "device_mesh"):
        return _dtensor_chunks(fqn, leaf)
    if hasattr(leaf, "local_shards") and not isinstance(leaf, torch.nn.Parameter):
        shards = leaf.local_shards()
        # There may be no shard: then other ranks have the data.
        if all(hasattr(shard, "metadata") for shard in shards):
            chunks = [
                (tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes), shard.tensor)
                for shard in shards
            ]
            return _items(fqn, leaf, tuple(leaf.size()), chunks)
    if hasattr(leaf, "__create_chunk_list__"):
        return _protocol_chunks(fqn, leaf, tuple(leaf.size()))
    if not isinstance(leaf, torch.Tensor):
        return None
    _check_data(fqn, leaf)
    slices: Any = leaf
    if hasattr(slices, "global_offsets") and hasattr(slices, "local_sizes"):
        # torch.distributed.checkpoint.CheckpointableTensor (2.14): slices of a plain tensor, named by global offset.
        chunks = []
        for offsets, local, sizes in zip(slices.global_offsets, slices.local_offsets, slices.local_sizes, strict=True):
            view = torch.Tensor.__getitem__(leaf, tuple(slice(o, o + n) for o, n in zip(local, sizes, strict=True)))
            chunks.append((tuple(offsets), tuple(sizes), view))
        return _items(fqn, leaf, tuple(slices.global_shape), chunks)
    # A subclass of Parameter without a state of its own is saved as plain memory. Other subclasses keep their type and attributes.
    if type(leaf) not in _PLAIN and (not isinstance(leaf, torch.nn.Parameter) or _keeps_state(leaf)):
        return None
    plain = _dense(leaf)
    if plain is None or leaf.dtype not in DTYPE_NAMES or leaf.dim() > MAX_DIMS:
        return None
    size = tuple(leaf.shape)
    return [(layout_module.Item(fqn, DTYPE_NAMES[leaf.dtype], size, (0,) * len(size), size), plain)]


def _dtensor_chunks(fqn: str, leaf: Any) -> list[tuple[layout_module.Item, torch.Tensor]]:
    if any(placement.is_partial() for placement in leaf.placements):
        raise UnsupportedLeaf(
            fqn=fqn,
            type_name=f"DTensor{tuple(leaf.placements)}",
            why="a Partial placement is a reduction that is still pending; redistribute() it to Replicate or Shard first",
        )
    if leaf.device_mesh.get_coordinate() is None:
        return []
    local = leaf.to_local()
    size = tuple(leaf.size())
    if hasattr(local, "__create_chunk_list__"):
        return _protocol_chunks(fqn, leaf, size)
    offsets, sizes = _dtensor_extent(size, leaf.device_mesh, tuple(leaf.placements))
    return _items(fqn, leaf, size, [(offsets, sizes, local)])


@functools.lru_cache(maxsize=65536)
def _dtensor_extent(
    size: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offsets and sizes of this rank's chunk. Cached: torch takes some 50 us a call, and a model has few distinct arguments."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(size, mesh, placements)
    return tuple(offsets), tuple(sizes)


def _protocol_chunks(fqn: str, leaf: Any, size: tuple[int, ...]) -> list[tuple[layout_module.Item, torch.Tensor]]:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    chunks = []
    for index, chunk in enumerate(leaf.__create_chunk_list__()):
        tensor = leaf.__get_tensor_shard__(MetadataIndex(fqn, chunk.offsets, index))
        chunks.append((tuple(chunk.offsets), tuple(chunk.sizes), tensor))
    return _items(fqn, leaf, size, chunks)


def _items(
    fqn: str, leaf: Any, size: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...], Any]]
) -> list[tuple[layout_module.Item, torch.Tensor]]:
    dtype = DTYPE_NAMES.get(leaf.dtype)
    if dtype is None:
        raise UnsupportedLeaf(fqn=fqn, type_name=type(leaf).__name__, why=f"shards of {leaf.dtype} cannot be written")
    # An empty shard is left out: its offset is at the tensor's end, and another rank has the data. A tensor that is empty as a
    # whole keeps one empty chunk. Otherwise it would be missing from the checkpoint.
    whole_is_empty = 0 in size
    return [
        (
            layout_module.Item(fqn, dtype, size, offsets if not whole_is_empty else (0,) * len(size), sizes),
            _shard(fqn, leaf, shard, sizes),
        )
        for offsets, sizes, shard in chunks
        if whole_is_empty or 0 not in sizes
    ]


def _shard(fqn: str, leaf: Any, shard: Any, sizes: tuple[int, ...]) -> torch.Tensor:
    """Return the memory of one shard as a plain tensor."""
    if hasattr(shard, "trigger_wait"):
        shard = shard.trigger_wait()  # an AsyncCollectiveTensor: its collective may still write to it
    _check_data(fqn, shard)
    plain = _dense(shard)
    if plain is None or plain.dtype != leaf.dtype:
        kind = type(shard).__name__
        raise UnsupportedLeaf(
            fqn=fqn,
            type_name=f"{type(leaf).__name__} of {kind}",
            why=f"its shards are not dense tensors of {leaf.dtype}, and a tensor of type {kind} can be saved only unsharded. Put"
            f" the inner tensors of to_local() (named by {kind}.__tensor_flatten__()) into the state dict instead, with a key"
            " for each rank; or put a dequantized copy there",
        )
    if tuple(plain.shape) != sizes:
        raise UnsupportedLeaf(
            fqn=fqn,
            type_name=type(leaf).__name__,
            why=f"a shard has the shape {tuple(plain.shape)}, but its metadata says {sizes}",
        )
    return plain


# --- what a tensor is -------------------------------------------------------------------------------------------------


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor without its own dispatch is a strided view of memory of its dtype."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _dense(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor as torch's own class, over the same memory. None for a wrapper around other tensors, or another layout."""
    if type(tensor) in _PLAIN:
        return tensor if _is_dense(tensor) else None
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor) if _is_dense(tensor) else None


def _keeps_state(leaf: object) -> bool:
    """Whether attributes of a tensor hold values, not only its use. (bitsandbytes keeps the scales of a weight in an attribute.)"""
    return any(
        not (isinstance(value, _USES) or inspect.isroutine(value) or isinstance(value, type))
        for attribute in vars(leaf).values()
        for value in (attribute if isinstance(attribute, (tuple, list)) else [attribute])
    )


def _check_data(fqn: str, leaf: Any) -> None:
    """
    Refuse a leaf without values.

    Raises:
        UnsupportedLeaf: a meta or fake tensor, or a wrapper around one; a parameter of a lazy module; a tensor of a torch.func
            transform.
    """
    kind = _lacking(leaf)
    if kind is not None:
        raise UnsupportedLeaf(fqn=fqn, type_name=f"{kind} {type(leaf).__name__}", why="it has no data yet")


def _lacking(leaf: Any) -> str | None:
    """Return why a tensor has no values, in one word. None if it has values."""
    if not isinstance(leaf, torch.Tensor):
        return None
    if torch.nn.parameter.is_lazy(leaf):
        return "uninitialized"
    if type(leaf).__name__ == "FakeTensor":
        return "fake"
    if leaf.is_meta:
        return "meta"
    if type(leaf) in _PLAIN:
        return "transformed" if _transforming() and torch._C._functorch.is_functorch_wrapped_tensor(leaf) else None
    if hasattr(leaf, "__tensor_flatten__"):
        for name in leaf.__tensor_flatten__()[0]:
            kind = _lacking(getattr(leaf, name))
            if kind is not None:
                return kind
    return None


def _transforming() -> bool:
    """Whether a torch.func transform (vmap, grad) runs in this thread. Then a tensor of a plain type may be a wrapper."""
    peek = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    return peek is not None and peek() is not None


# --- before a load ----------------------------------------------------------------------------------------------------


def check_fillable(leaves: Leaves) -> None:
    """
    Refuse load targets whose elements cannot hold separate values, before anything is written.

    Raises:
        IncompatibleCheckpoint: elements of a tensor share memory (an expanded tensor). Names all such tensors.
    """
    shared = [
        item.fqn for item, tensor in zip(leaves.layout.items, leaves.tensors, strict=True) if _shares_elements(tensor)
    ]
    if shared:
        raise IncompatibleCheckpoint(
            f"cannot fill {', '.join(map(repr, shared))}: some of its elements share memory (expand or as_strided);"
            " pass a clone() to load()",
            fqns=shared,
        )


def _shares_elements(tensor: torch.Tensor) -> bool:
    """Whether the tensor has more elements than memory locations within its strides."""
    if tensor.is_contiguous():
        return False
    strides = [(abs(stride), size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    if not strides or 0 in tensor.shape:
        return False
    unit = math.gcd(*(stride for stride, _ in strides))
    if unit == 0 or any(stride == 0 for stride, _ in strides):
        return True
    return math.prod(size for _, size in strides) > 1 + sum(stride // unit * (size - 1) for stride, size in strides)
