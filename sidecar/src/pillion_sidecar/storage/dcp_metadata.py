"""
DCP's `.metadata` without torch. No other module writes that file, or reads one of stock DCP.

`.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. `encode` writes it opcode by opcode, as stock `dcp.load` of torch
2.6 to 2.15 reads it. `decode` runs an unpickler that knows the few names of that format and refuses every other name, so that a file cannot
choose code to run. The dataclasses below describe the content, with one entry for each leaf.

Pillion's file differs from that of stock 2.15 in these points:

- The state of `TensorProperties` is the 5-tuple. The 6-tuple, with strides, stops every torch before 2.15 (pytorch#194251).
- `checkpoint_id` is a string, never a pathlib object. Python 3.13 pickles those under a name that 3.12 does not have.
- `_StorageInfo` has no `transform_descriptors`. Readers that know the field (from 2.7 on) take its class default.
- `version` is set. The `Metadata` of torch before 2.9 keeps it as an attribute that no code reads.
- The protocol is 2, and every name in the file exists in all those versions.

Called from: the coordinator's commit (`encode`); the loader and retention, for checkpoints of other programs (`decode`).
This module must never import torch, or build anything but its stand-ins from the content of a file.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.6 to 2.15; the opcodes:
Lib/pickletools.py.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pillion_sidecar.storage import archive, dcp_unpickler, pickle_opcodes

VERSION: Final = "1.0.0"
"""Version that stock DCP from 2.9 on writes into its metadata."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One rectangle of a tensor, and the archive (see `archive`) that holds it."""

    offsets: tuple[int, ...]
    """Offsets of the rectangle in the whole tensor, in items; as many as `sizes`."""
    sizes: tuple[int, ...]
    """Sizes of the rectangle, in items."""
    relative_path: str
    """Path of the file, from the checkpoint's directory."""
    offset: int
    """Offset of the archive in the file, in bytes."""
    length: int
    """Length of the archive, in bytes, with its head and tail."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A leaf that is a tensor. Its chunks tile it. The planner ensures this, and it is not checked here."""

    dtype: str
    """A key of `archive.SUPPORTED_DTYPES`."""
    size: tuple[int, ...]
    """Global shape of the tensor."""
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class BytesEntry:
    """A leaf that is no tensor: a `torch.save` of any object, which only the trainer unpickles."""

    relative_path: str
    """Path of the file, from the checkpoint's directory."""
    offset: int
    """Offset of the item in the file, in bytes."""
    length: int
    """Length of the item, in bytes."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a `.metadata` file."""

    entries: Mapping[str, TensorEntry | BytesEntry]
    """Entries by FQN (DCP's flattened key)."""
    mappings: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    """Paths by FQN: the keys and list positions that lead to the leaf in the nested state dict. DCP: `planner_data`."""
    checkpoint_id: str | None = None
    """Name that the writer gave the checkpoint, most often its directory. No reader uses it."""
    save_id: str | None = None
    """Id of the save, different for each save."""
    version: str | None = VERSION
    """Version of the metadata; None in files of torch before 2.9."""


def encode(checkpoint: Checkpoint) -> bytes:
    """
    Return the content of a `.metadata` file that stock `dcp.load` of torch 2.6 to 2.15 reads.

    Raises: ValueError if the dtype of an entry is not known.
    Blocks: for about 1 s per 100,000 tensors of one chunk, with the GIL held.
    """
    return _Encoder().encode(checkpoint)


def decode(data: bytes) -> Checkpoint:
    """
    Return the content of a `.metadata` file that any torch from 2.6 to 2.15 wrote, on any Python.

    A file cannot make this function import or call anything. Memory and time grow with the file's length alone.

    Raises: ValueError in these cases: the file has a name that the format does not need (the message has the name); the bytes are not such a
    pickle; an item has no location, or a path that leaves the checkpoint's directory; an item was transformed (compressed).
    Blocks: for about 6 s per 100,000 tensors of one chunk, with the GIL held; a third of it is the garbage collector's.
    """
    return _checkpoint(dcp_unpickler.load(data))


_NEW: Final = b")\x81}("  # EMPTY_TUPLE NEWOBJ EMPTY_DICT MARK: an instance of the class on the stack; state begins
_BUILT: Final = b"ub"  # SETITEMS BUILD: the state ends
_DICT: Final = b"}("  # EMPTY_DICT MARK
_DICT_END: Final = b"u"  # SETITEMS


_FIRST_TEXT: Final = 256
"""First memo index of strings. There are about 20 constants, and one more for each dtype."""


class _Encoder:
    """
    Encodes one pickle.

    Classes and strings that recur are put into the memo at their first use and fetched afterwards. Content that repeats (a dtype's properties, a
    shape) is encoded once and its opcodes are repeated, so that the reader gets a separate object each time.
    """

    def __init__(self) -> None:
        self._prelude: list[bytes] = [b"\x80\x02"]
        self._memo: dict[str, bytes] = {}
        self._sizes: dict[tuple[int, ...], bytes] = {}
        self._properties: dict[str, bytes] = {}
        self._properties_class = self._class("TensorProperties")
        self._size_class = self._constant(pickle_opcodes.push_global("torch", "Size"))

    def encode(self, checkpoint: Checkpoint) -> bytes:
        metadata = self._class("Metadata")
        storage_meta = self._class("StorageMeta")
        # The prelude has all constants. It is complete only after the parts are encoded.
        parts: list[bytes] = [metadata, _NEW, pickle_opcodes.push_str("state_dict_metadata"), _DICT]
        self._add_leaves(parts, checkpoint.entries)
        parts += (_DICT_END, pickle_opcodes.push_str("planner_data"), _DICT)
        for fqn, path in checkpoint.mappings.items():
            parts += (self._text(fqn), self._path(path))
        parts += (_DICT_END, pickle_opcodes.push_str("storage_data"), _DICT)
        self._add_locations(parts, checkpoint.entries)
        parts += (_DICT_END, pickle_opcodes.push_str("storage_meta"), storage_meta, _NEW)
        parts += (_ids(checkpoint.checkpoint_id, checkpoint.save_id), pickle_opcodes.push_str("load_id"), b"N")
        # `modules` (from 2.7 on) has no class default. Older versions ignore it.
        parts += (pickle_opcodes.push_str("modules"), b"]", _BUILT)
        parts += (pickle_opcodes.push_str("version"), _optional_str(checkpoint.version), _BUILT, b".")
        return b"".join(self._prelude) + b"".join(parts)

    def _add_leaves(self, parts: list[bytes], entries: Mapping[str, TensorEntry | BytesEntry]) -> None:
        tensor_new = self._class("TensorStorageMetadata") + _NEW
        tensor_new += self._key("properties")
        size_key = self._key("size")
        chunks_key = self._key("chunks") + b"]("  # EMPTY_LIST MARK
        chunk_new = self._class("ChunkStorageMetadata") + _NEW
        chunk_new += self._key("offsets")
        sizes_key = self._key("sizes")
        bytes_new = self._class("BytesStorageMetadata") + b")\x81"
        for fqn, entry in entries.items():
            match entry:
                case TensorEntry():
                    parts += (self._text(fqn), tensor_new, self._tensor_properties(entry.dtype))
                    parts += (size_key, self._size(entry.size), chunks_key)
                    for chunk in entry.chunks:
                        parts += (chunk_new, self._size(chunk.offsets), sizes_key, self._size(chunk.sizes), _BUILT)
                    parts += (b"e", _BUILT)  # APPENDS
                case BytesEntry():
                    parts += (self._text(fqn), bytes_new)

    def _add_locations(self, parts: list[bytes], entries: Mapping[str, TensorEntry | BytesEntry]) -> None:
        index_new = self._class("MetadataIndex") + _NEW
        index_new += self._key("fqn")
        index_key = self._key("index")
        offset_key = self._key("offset")
        no_index = index_key + b"N" + _BUILT
        info_new = self._constant(pickle_opcodes.push_global(dcp_unpickler.FILESYSTEM_MODULE, "_StorageInfo")) + _NEW
        info_new += self._key("relative_path")
        length_key = self._key("length")

        def info(item: Chunk | BytesEntry) -> tuple[bytes, ...]:
            offset, length = pickle_opcodes.push_int(item.offset), pickle_opcodes.push_int(item.length)
            return (info_new, self._text(item.relative_path), offset_key, offset, length_key, length, _BUILT)

        for fqn, entry in entries.items():
            match entry:
                case TensorEntry():
                    for index, chunk in enumerate(entry.chunks):
                        parts += (index_new, self._text(fqn), index_key, pickle_opcodes.push_int(index))
                        parts += (offset_key, self._size(chunk.offsets), _BUILT)
                        parts += info(chunk)
                case BytesEntry():
                    parts += (index_new, self._text(fqn), no_index)
                    parts += info(entry)

    def _class(self, name: str) -> bytes:
        return self._constant(pickle_opcodes.push_global(dcp_unpickler.METADATA_MODULE, name))

    def _key(self, name: str) -> bytes:
        return self._constant(pickle_opcodes.push_str(name))

    def _constant(self, opcodes: bytes) -> bytes:
        """Put the value of `opcodes` into the memo before all else. Return the opcodes that fetch it."""
        put, get = _memo_opcodes(len(self._prelude) - 1)
        self._prelude.append(opcodes + put + b"0")  # POP
        return get

    def _text(self, value: str) -> bytes:
        """Return the opcodes of a string, and keep it in the memo: FQNs and file names occur several times."""
        index = self._memo.get(value)
        if index is not None:
            return index
        # Strings have indices far above those of constants. So neither needs to know the number of the others.
        put, self._memo[value] = _memo_opcodes(_FIRST_TEXT + len(self._memo))
        return pickle_opcodes.push_str(value) + put

    def _size(self, sizes: tuple[int, ...]) -> bytes:
        index = self._sizes.get(sizes)
        if index is None:
            # torch.Size((...)): TUPLE1 REDUCE
            index = self._sizes[sizes] = self._size_class + pickle_opcodes.push_ints(sizes) + b"\x85R"
        return index

    def _tensor_properties(self, dtype: str) -> bytes:
        index = self._properties.get(dtype)
        if index is not None:
            return index
        if dtype not in archive.SUPPORTED_DTYPES:
            raise ValueError(
                f"dtype {dtype!r} cannot be stored; known are {', '.join(sorted(archive.SUPPORTED_DTYPES))}"
            )
        layout = (
            pickle_opcodes.push_global("torch.serialization", "_get_layout")
            + pickle_opcodes.push_str("torch.strided")
            + b"\x85R"
        )
        # Enum member 0: TORCH_CONTIGUOUS_FORMAT.
        memory_format = (
            pickle_opcodes.push_global(dcp_unpickler.METADATA_MODULE, "_MEM_FORMAT_ENCODING")
            + pickle_opcodes.push_int(0)
            + b"\x85R"
        )
        # The 5-tuple (dtype, layout, requires_grad, memory_format, pin_memory). The tuple and its elements are immutable and can be shared.
        # TensorProperties is mutable, so each tensor gets its own.
        state = self._constant(
            b"(" + pickle_opcodes.push_global("torch", dtype) + layout + b"\x89" + memory_format + b"\x89t"
        )
        index = self._properties[dtype] = self._properties_class + b")\x81" + state + b"b"
        return index

    def _path(self, path: tuple[str | int, ...]) -> bytes:
        items = b"".join(self._text(key) if isinstance(key, str) else pickle_opcodes.push_int(key) for key in path)
        return b"(" + items + b"t"


def _memo_opcodes(index: int) -> tuple[bytes, bytes]:
    """Return the opcodes that put the top of the stack into the memo at `index`, and those that fetch it."""
    if index < 256:
        number = index.to_bytes(1, "little")
        return b"q" + number, b"h" + number
    number = index.to_bytes(4, "little")
    return b"r" + number, b"j" + number


def identified(encoded: bytes, checkpoint_id: str, save_id: str) -> bytes:
    """
    Return the content that `encode` made of a checkpoint without ids, with these ids added. To encode it takes seconds, and without ids it is
    the same from save to save.

    Raises:
        ValueError: the content is not that of `encode`, or has ids already.
    """
    at = encoded.rindex(_ids(None, None))
    return encoded[:at] + _ids(checkpoint_id, save_id) + encoded[at + len(_ids(None, None)) :]


def _ids(checkpoint_id: str | None, save_id: str | None) -> bytes:
    named = (("checkpoint_id", checkpoint_id), ("save_id", save_id))
    return b"".join(pickle_opcodes.push_str(name) + _optional_str(value) for name, value in named)


def _optional_str(value: str | None) -> bytes:
    return b"N" if value is None else pickle_opcodes.push_str(value)


def _checkpoint(root: object) -> Checkpoint:
    state = dcp_unpickler.fields(root, dcp_unpickler.Metadata, "the root")
    locations = _locations(state.get("storage_data"))
    entries: dict[str, TensorEntry | BytesEntry] = {}
    for fqn, leaf in dcp_unpickler.expect(state.get("state_dict_metadata"), dict, "state_dict_metadata").items():
        entries[dcp_unpickler.expect(fqn, str, "an FQN")] = _entry(fqn, leaf, locations)
    meta: dict[str, Any] = {}
    if state.get("storage_meta") is not None:
        meta = dcp_unpickler.fields(state["storage_meta"], dcp_unpickler.StorageMeta, "storage_meta")
    return Checkpoint(
        entries=entries,
        mappings=_mappings(state.get("planner_data")),
        checkpoint_id=_optional(meta.get("checkpoint_id"), "checkpoint_id"),
        save_id=_optional(meta.get("save_id"), "save_id"),
        version=_optional(state.get("version"), "version"),
    )


def _optional(value: object, what: str) -> str | None:
    return None if value is None else dcp_unpickler.expect(value, str, what)


def _entry(
    fqn: str, leaf: object, locations: Mapping[tuple[str, tuple[int, ...] | None], BytesEntry]
) -> TensorEntry | BytesEntry:
    if isinstance(leaf, dcp_unpickler.BytesStorageMetadata):
        return _location(locations, fqn, None)
    state = dcp_unpickler.fields(leaf, dcp_unpickler.TensorStorageMetadata, f"the entry of {fqn!r}")
    size = dcp_unpickler.sizes(state.get("size"))
    chunks = []
    for chunk in dcp_unpickler.expect(state.get("chunks"), list, f"the chunks of {fqn!r}"):
        fields = dcp_unpickler.fields(chunk, dcp_unpickler.ChunkStorageMetadata, f"a chunk of {fqn!r}")
        offsets, sizes = dcp_unpickler.sizes(fields.get("offsets")), dcp_unpickler.sizes(fields.get("sizes"))
        if not len(offsets) == len(sizes) == len(size):
            raise ValueError(f"{fqn!r} of shape {size} has a chunk of shape {sizes} at {offsets}")
        at = _location(locations, fqn, offsets)
        chunks.append(Chunk(offsets, sizes, at.relative_path, at.offset, at.length))
    return TensorEntry(_dtype(fqn, state.get("properties")), size, tuple(chunks))


def _dtype(fqn: str, properties: object) -> str:
    instance = dcp_unpickler.expect(properties, dcp_unpickler.TensorProperties, f"the properties of {fqn!r}")
    state = dcp_unpickler.expect(getattr(instance, "state", None), tuple, f"the state of the properties of {fqn!r}")
    if len(state) not in (5, 6):
        raise ValueError(f"the properties of {fqn!r} have {len(state)} fields; torch 2.6 to 2.15 write 5 or 6")
    dtype = dcp_unpickler.expect(state[0], str, f"the dtype of {fqn!r}")
    if dtype not in archive.SUPPORTED_DTYPES:
        raise ValueError(f"{fqn!r} has dtype {dtype!r}, which is not known")
    return dtype


def _locations(storage_data: object) -> dict[tuple[str, tuple[int, ...] | None], BytesEntry]:
    locations = {}
    for index, info in dcp_unpickler.expect(storage_data, dict, "storage_data").items():
        index_fields = dcp_unpickler.fields(index, dcp_unpickler.MetadataIndex, "a key of storage_data")
        fqn = dcp_unpickler.expect(index_fields.get("fqn"), str, "an FQN")
        offsets = index_fields.get("offset")
        fields = dcp_unpickler.fields(info, dcp_unpickler.StorageInfo, f"the location of {fqn!r}")
        if fields.get("transform_descriptors"):
            through = reprlib.repr(fields["transform_descriptors"])
            raise ValueError(f"{fqn!r} was written through {through}, which we do not undo")
        relative_path = dcp_unpickler.expect(fields.get("relative_path"), str, f"the file of {fqn!r}")
        if relative_path.startswith("/") or ".." in relative_path.split("/"):
            raise ValueError(f"{fqn!r} lies in {relative_path!r}, outside the checkpoint's directory")
        offset, length = dcp_unpickler.sizes((fields.get("offset"), fields.get("length")))
        locations[fqn, None if offsets is None else dcp_unpickler.sizes(offsets)] = BytesEntry(
            relative_path, offset, length
        )
    return locations


def _location(
    locations: Mapping[tuple[str, tuple[int, ...] | None], BytesEntry], fqn: str, offsets: tuple[int, ...] | None
) -> BytesEntry:
    try:
        return locations[fqn, offsets]
    except KeyError:
        where = "" if offsets is None else f" at {offsets}"
        raise ValueError(f"the file does not say where {fqn!r}{where} lies") from None


def _mappings(planner_data: object) -> dict[str, tuple[str | int, ...]]:
    if planner_data is None:
        return {}
    mappings: dict[str, tuple[str | int, ...]] = {}
    for fqn, path in dcp_unpickler.expect(planner_data, dict, "planner_data").items():
        keys = dcp_unpickler.expect(path, tuple, f"the path of {fqn!r}")
        for key in keys:
            dcp_unpickler.expect(key, (str, int), f"a key in the path of {fqn!r}")
        mappings[dcp_unpickler.expect(fqn, str, "an FQN")] = keys
    return mappings
