"""DCP's `.metadata`: what stock torch makes of ours, what we make of stock's, and what is refused."""

import dataclasses
import enum
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem, format_utils, metadata, state_dict_loader, state_dict_saver

from pillion_sidecar.storage import archive, dcp_metadata

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning", "ignore:BComplex32:UserWarning")

GOLDEN: Final = Path(__file__).parents[3] / "golden" / "dcp_metadata"
"""Each file: the `.metadata` of a stock dcp.save of one small state dict; the name says which torch (and Python)."""

METADATA: Final = "torch.distributed.checkpoint.metadata"
FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"

SMALL: Final = dcp_metadata.Checkpoint(
    entries={
        "model.w": dcp_metadata.TensorEntry(
            "float32",
            (6, 4),
            (
                dcp_metadata.Chunk((0, 0), (2, 4), "__0_0.1.distcp", 0, 2048),
                dcp_metadata.Chunk((2, 0), (4, 4), "__1_0.1.distcp", 2**33, 2048),
            ),
        ),
        "model.b": dcp_metadata.TensorEntry(
            "bfloat16", (), (dcp_metadata.Chunk((), (), "__0_0.1.distcp", 2048, 1600),)
        ),
        "step": dcp_metadata.BytesEntry("__0_0.1.distcp", 4096, 300),
    },
    mappings={"model.w": ("model", "w"), "model.b": ("model", "b", 0), "step": ("step",)},
    checkpoint_id="step-3",
    save_id="a-1",
)


def stock_form_of_small() -> metadata.Metadata:
    """What stock DCP has in memory for SMALL."""

    def tensor(dtype: torch.dtype, size: tuple[int, ...], *chunks: tuple[Any, Any]) -> metadata.TensorStorageMetadata:
        return metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=dtype),
            torch.Size(size),
            [metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks],
        )

    return metadata.Metadata(
        state_dict_metadata={
            "model.w": tensor(torch.float32, (6, 4), ((0, 0), (2, 4)), ((2, 0), (4, 4))),
            "model.b": tensor(torch.bfloat16, (), ((), ())),
            "step": metadata.BytesStorageMetadata(),
        },
        planner_data=dict(SMALL.mappings),
        storage_data={
            metadata.MetadataIndex("model.w", (0, 0), 0): filesystem._StorageInfo("__0_0.1.distcp", 0, 2048),
            metadata.MetadataIndex("model.w", (2, 0), 1): filesystem._StorageInfo("__1_0.1.distcp", 2**33, 2048),
            metadata.MetadataIndex("model.b", (), 0): filesystem._StorageInfo("__0_0.1.distcp", 2048, 1600),
            metadata.MetadataIndex("step"): filesystem._StorageInfo("__0_0.1.distcp", 4096, 300),
        },
        storage_meta=metadata.StorageMeta(checkpoint_id="step-3", save_id="a-1"),
        version="1.0.0",
    )


def names_in(data: bytes) -> set[str]:
    """The names a protocol 2 pickle refers to."""
    return {str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}


# --- What we write ---------------------------------------------------------------------------------------------------


def test_stock_classes_unpickle_ours_to_what_stock_would_hold() -> None:
    """With the installed torch's own classes, our bytes become the Metadata that stock DCP would have written."""
    read = pickle.loads(dcp_metadata.encode(SMALL))
    assert read == stock_form_of_small()
    # Equality of MetadataIndex leaves the index out; the type of a size is part of what callers rely on.
    assert {index.fqn: index.index for index in read.storage_data if index.fqn != "model.w"} == {
        "model.b": 0,
        "step": None,
    }
    assert [index.index for index in read.storage_data if index.fqn == "model.w"] == [0, 1]
    weight = read.state_dict_metadata["model.w"]
    assert {type(weight.size), type(weight.chunks[0].offsets), type(weight.chunks[0].sizes)} == {torch.Size}


def test_nothing_that_can_change_is_shared_between_entries() -> None:
    """A caller that changes the properties of one tensor in a loaded Metadata does not change those of another."""
    entry = dcp_metadata.TensorEntry("float32", (1,), (dcp_metadata.Chunk((0,), (1,), "f", 0, 1600),))
    read = pickle.loads(dcp_metadata.encode(dcp_metadata.Checkpoint({"a": entry, "b": entry})))
    assert read.state_dict_metadata["a"].properties is not read.state_dict_metadata["b"].properties
    assert read.state_dict_metadata["a"].chunks is not read.state_dict_metadata["b"].chunks


def test_ours_refers_to_these_names_and_no_others() -> None:
    """The names in our pickle are those that every torch from 2.6 on can import, on every Python."""
    assert names_in(dcp_metadata.encode(SMALL)) == {
        f"{METADATA} Metadata",
        f"{METADATA} TensorStorageMetadata",
        f"{METADATA} BytesStorageMetadata",
        f"{METADATA} ChunkStorageMetadata",
        f"{METADATA} TensorProperties",
        f"{METADATA} MetadataIndex",
        f"{METADATA} StorageMeta",
        f"{METADATA} _MEM_FORMAT_ENCODING",
        f"{FILESYSTEM} _StorageInfo",
        "torch Size",
        "torch float32",
        "torch bfloat16",
        "torch.serialization _get_layout",
    }


def test_a_dtype_that_is_not_known_is_refused() -> None:
    """A dtype whose name torch does not have would make the whole checkpoint unreadable."""
    entry = dcp_metadata.TensorEntry("float3", (1,), (dcp_metadata.Chunk((0,), (1,), "f", 0, 1600),))
    with pytest.raises(ValueError, match="'float3'"):
        dcp_metadata.encode(dcp_metadata.Checkpoint({"a": entry}))


def write_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of all dtypes by our own hand, each tensor in two chunks in two files; returns what it holds."""
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, dcp_metadata.TensorEntry | dcp_metadata.BytesEntry] = {}
    files = {"__0_0.1.distcp": bytearray(), "__1_0.1.distcp": bytearray()}
    for dtype, itemsize in archive.SUPPORTED_DTYPES.items():
        if not hasattr(torch, dtype):
            continue
        payload = bytes(index % 2 for index in range(5 * 3 * itemsize))
        fqn = f"model.{dtype}"
        tensors[fqn] = torch.frombuffer(bytearray(payload), dtype=getattr(torch, dtype)).reshape(5, 3)
        chunks = []
        for path, first_row, num_rows in (("__0_0.1.distcp", 0, 2), ("__1_0.1.distcp", 2, 3)):
            part = payload[first_row * 3 * itemsize : (first_row + num_rows) * 3 * itemsize]
            length = archive.archive_bytes(len(part))
            chunks.append(dcp_metadata.Chunk((first_row, 0), (num_rows, 3), path, len(files[path]), length))
            files[path] += archive.head(dtype, (num_rows, 3), len(part)) + part
            files[path] += bytes(-len(part) % archive.ALIGNMENT) + archive.tail(dtype, (num_rows, 3), len(part))
        entries[fqn] = dcp_metadata.TensorEntry(dtype, (5, 3), tuple(chunks))
    step = io.BytesIO()
    torch.save(3, step)
    entries["step"] = dcp_metadata.BytesEntry("__0_0.1.distcp", len(files["__0_0.1.distcp"]), len(step.getvalue()))
    files["__0_0.1.distcp"] += step.getvalue()
    for path, content in files.items():
        (directory / path).write_bytes(content)
    mappings: dict[str, tuple[str | int, ...]] = {fqn: tuple(fqn.split(".")) for fqn in entries}
    encoded = dcp_metadata.encode(dcp_metadata.Checkpoint(entries, mappings, checkpoint_id="step-3", save_id="a-1"))
    (directory / ".metadata").write_bytes(encoded)
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().untyped_storage())


def test_stock_load_reads_a_checkpoint_made_by_hand(tmp_path: Path) -> None:
    """Stock dcp.load fills a state dict of every dtype, bit for bit, from our files alone, out of two chunks each."""
    tensors = write_checkpoint(tmp_path)
    state_dict: dict[str, Any] = {
        "model": {fqn.removeprefix("model."): torch.empty_like(tensor) for fqn, tensor in tensors.items()},
        "step": None,
    }
    state_dict_loader.load(state_dict, checkpoint_id=tmp_path)
    assert state_dict["step"] == 3
    assert len(tensors) >= 20
    for fqn, tensor in tensors.items():
        assert raw(state_dict["model"][fqn.removeprefix("model.")]) == raw(tensor), fqn


def test_stock_conversion_to_torch_save_works_on_ours(tmp_path: Path) -> None:
    """DCP's own converter, which knows no state dict, rebuilds the nested one from our mappings."""
    tensors = write_checkpoint(tmp_path)
    format_utils.dcp_to_torch_save(tmp_path, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert whole["step"] == 3
    assert {f"model.{name}": raw(tensor) for name, tensor in whole["model"].items()} == {
        fqn: raw(tensor) for fqn, tensor in tensors.items()
    }


# --- Versions of torch -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one version's metadata.py and filesystem.py say; seen with tools/check_metadata_classes.py."""

    arities: frozenset[int]
    """Lengths of the TensorProperties state that its __setstate__ takes."""
    storage_info: tuple[str, ...]
    metadata: tuple[str, ...]
    storage_meta: tuple[str, ...]


_INFO = ("relative_path", "offset", "length")
_ROOT = ("state_dict_metadata", "planner_data", "storage_data", "storage_meta")
_META = ("checkpoint_id", "save_id", "load_id")
_BEFORE_STRIDES = Facts(
    frozenset({5}), (*_INFO, "transform_descriptors"), (*_ROOT, "version"), (*_META, "modules")
)  # fmt: skip

VERSIONS: Final = {
    "2.6": Facts(frozenset({5}), _INFO, _ROOT, _META),
    "2.9": _BEFORE_STRIDES,
    "2.12": _BEFORE_STRIDES,
    "2.14": _BEFORE_STRIDES,
    "2.15": dataclasses.replace(_BEFORE_STRIDES, arities=frozenset({5, 6})),
}

REQUIRED: Final = {*_INFO, "state_dict_metadata"}
"""Fields without a default, in all versions."""


def classes_of(facts: Facts) -> dict[tuple[str, str], Any]:
    """Classes with a version's fields and its __setstate__, under the names that a pickle has for them."""

    class MemoryFormat(enum.Enum):
        TORCH_CONTIGUOUS_FORMAT = 0

    class TensorProperties:
        dtype: object

        def __setstate__(self, state: tuple[object, ...]) -> None:
            if len(state) not in facts.arities:
                raise ValueError(f"this version takes states of length {sorted(facts.arities)}, not {len(state)}")
            self.dtype, _, _, memory_format, *_ = state
            assert memory_format is MemoryFormat.TORCH_CONTIGUOUS_FORMAT

    def made(name: str, fields: tuple[str, ...]) -> type:
        def spec(field: str) -> Any:
            if field in REQUIRED:
                return (field, object)
            if field == "modules":
                return (field, object, dataclasses.field(default_factory=list[str]))
            return (field, object, dataclasses.field(default=None))

        return dataclasses.make_dataclass(name, [spec(field) for field in fields])

    return {
        (METADATA, "Metadata"): made("Metadata", facts.metadata),
        (METADATA, "StorageMeta"): made("StorageMeta", facts.storage_meta),
        (FILESYSTEM, "_StorageInfo"): made("_StorageInfo", facts.storage_info),
        (METADATA, "TensorProperties"): TensorProperties,
        (METADATA, "_MEM_FORMAT_ENCODING"): MemoryFormat,
    }


class VersionUnpickler(pickle.Unpickler):
    """The standard unpickler with one version's classes; what never changed is taken from the installed torch."""

    def __init__(self, data: bytes, facts: Facts) -> None:
        super().__init__(io.BytesIO(data))
        self._classes = classes_of(facts)

    def find_class(self, module: str, name: str, /) -> Any:
        return self._classes.get((module, name)) or super().find_class(module, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_classes_of_each_version_unpickle_ours_and_every_field_is_there(version: str) -> None:
    """Our pickle restores in each version's classes, and each field that the version knows can be read."""
    facts = VERSIONS[version]
    read = VersionUnpickler(dcp_metadata.encode(SMALL), facts).load()
    assert {name: getattr(read, name) for name in facts.metadata}.keys() == set(facts.metadata)
    assert [getattr(read.storage_meta, name) for name in facts.storage_meta][:3] == ["step-3", "a-1", None]
    assert read.planner_data == SMALL.mappings
    assert read.state_dict_metadata["model.w"].properties.dtype is torch.float32
    infos = [tuple(getattr(info, name) for name in facts.storage_info) for info in read.storage_data.values()]
    assert [info[:3] for info in infos] == [
        ("__0_0.1.distcp", 0, 2048),
        ("__1_0.1.distcp", 2**33, 2048),
        ("__0_0.1.distcp", 2048, 1600),
        ("__0_0.1.distcp", 4096, 300),
    ]
    assert all(info[3:] in ((), (None,)) for info in infos)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_stock_2_15_writes_is_lost_to_older_versions(version: str) -> None:
    """This is why we write the file ourselves: only versions that know strides read a stock 2.15 file."""
    stock = (GOLDEN / "torch-2.15.0.metadata").read_bytes()
    if 6 in VERSIONS[version].arities:
        VersionUnpickler(stock, VERSIONS[version]).load()
    else:
        with pytest.raises(ValueError, match="not 6"):
            VersionUnpickler(stock, VERSIONS[version]).load()


def test_the_table_says_what_the_installed_torch_says() -> None:
    """The facts of the version that is installed here are those of its own classes."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in VERSIONS:
        pytest.skip(f"the table has no torch {version}")
    facts = VERSIONS[version]
    for kind, names in (
        (metadata.Metadata, facts.metadata),
        (metadata.StorageMeta, facts.storage_meta),
        (filesystem._StorageInfo, facts.storage_info),
    ):
        assert tuple(field.name for field in dataclasses.fields(kind)) == names
    assert len(metadata.TensorProperties().__getstate__()) == max(facts.arities)


# --- What we read ----------------------------------------------------------------------------------------------------


def test_what_is_encoded_is_decoded() -> None:
    """Nothing is lost on the way through the file."""
    assert dcp_metadata.decode(dcp_metadata.encode(SMALL)) == SMALL


numbers = st.integers(min_value=0, max_value=2**63 - 1)
texts = st.text(max_size=12)
paths = texts.filter(lambda path: not path.startswith("/") and ".." not in path.split("/"))


@st.composite
def tensor_entries(draw: st.DrawFn) -> dcp_metadata.TensorEntry:
    num_dims = draw(st.integers(min_value=0, max_value=5))
    shapes = st.tuples(*[numbers] * num_dims)
    all_offsets = draw(st.lists(shapes, max_size=3, unique=True))
    chunks = [
        dcp_metadata.Chunk(offsets, draw(shapes), draw(paths), draw(numbers), draw(numbers)) for offsets in all_offsets
    ]
    return dcp_metadata.TensorEntry(
        draw(st.sampled_from(sorted(archive.SUPPORTED_DTYPES))), draw(shapes), tuple(chunks)
    )


checkpoints = st.builds(
    dcp_metadata.Checkpoint,
    entries=st.dictionaries(
        texts, tensor_entries() | st.builds(dcp_metadata.BytesEntry, paths, numbers, numbers), max_size=4
    ),
    mappings=st.dictionaries(
        texts, st.lists(texts | st.integers(min_value=-(2**70), max_value=2**70), max_size=3).map(tuple), max_size=4
    ),
    checkpoint_id=st.none() | texts,
    save_id=st.none() | texts,
    version=st.none() | texts,
)


@given(checkpoint=checkpoints)
def test_ids_are_put_into_what_was_encoded_without_them(checkpoint: dcp_metadata.Checkpoint) -> None:
    """The bytes are those of encoding them with it; a second time is an error, and not a second pair of ids."""
    plain = dataclasses.replace(checkpoint, checkpoint_id=None, save_id=None)
    made = dcp_metadata.identified(dcp_metadata.encode(plain), "/runs/\udcff/step-1", "an id")
    assert made == dcp_metadata.encode(dataclasses.replace(plain, checkpoint_id="/runs/\udcff/step-1", save_id="an id"))
    with pytest.raises(ValueError, match="not found"):
        dcp_metadata.identified(made, "again", "again")


@given(checkpoint=checkpoints)
def test_any_checkpoint_survives_the_file(checkpoint: dcp_metadata.Checkpoint) -> None:
    """Whatever the shapes, numbers and texts, decode returns what encode got."""
    assert dcp_metadata.decode(dcp_metadata.encode(checkpoint)) == checkpoint


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.metadata")), ids=lambda path: path.name)
def test_what_stock_wrote_is_read(path: Path) -> None:
    """The files of stock dcp.save of each torch say the same state dict, down to where each item lies."""
    read = dcp_metadata.decode(path.read_bytes())
    assert read.mappings == {
        "model.w": ("model", "w"),
        "model.b": ("model", "b"),
        "step": ("step",),
        "opt.0": ("opt", 0),
        "opt.1.x": ("opt", 1, "x"),
    }
    kinds = {
        fqn: (entry.dtype, entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks])
        if isinstance(entry, dcp_metadata.TensorEntry)
        else None
        for fqn, entry in read.entries.items()
    }
    assert kinds == {
        "model.w": ("float32", (3, 4), [((0, 0), (3, 4))]),
        "model.b": ("bfloat16", (), [((), ())]),
        "opt.0": ("int64", (2,), [((0,), (2,))]),
        "step": None,
        "opt.1.x": None,
    }
    assert read.checkpoint_id == "step-3"
    assert read.version == (None if "2.6" in path.name else "1.0.0")
    slices = sorted(
        (item.offset, item.length)
        for entry in read.entries.values()
        for item in (entry.chunks if isinstance(entry, dcp_metadata.TensorEntry) else (entry,))
    )
    ends = [offset + length for offset, length in slices]
    assert [offset for offset, _ in slices] == [0, *ends[:-1]]


def test_what_the_installed_torch_writes_is_read_and_leads_to_the_tensors(tmp_path: Path) -> None:
    """Of a fresh stock save we find each tensor: torch.load of the slice that decode names gives the tensor back."""
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state_dict_saver.save({"model": {"w": weight}, "step": 7}, checkpoint_id=tmp_path)
    read = dcp_metadata.decode((tmp_path / ".metadata").read_bytes())
    assert read.checkpoint_id == str(tmp_path)
    entry = read.entries["model.w"]
    assert isinstance(entry, dcp_metadata.TensorEntry)
    chunk = entry.chunks[0]
    content = (tmp_path / chunk.relative_path).read_bytes()[chunk.offset : chunk.offset + chunk.length]
    assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), weight)


@pytest.mark.parametrize(
    ("class_name", "parts", "expected"),
    [
        ("pathlib PosixPath", ["/", "data", "step-3"], "/data/step-3"),
        ("pathlib._local PosixPath", ["/data", "step-3"], "/data/step-3"),
        ("pathlib PurePosixPath", ["step-3"], "step-3"),
        ("pathlib PosixPath", [], "."),
        ("pathlib WindowsPath", ["C:\\", "data"], "C:\\data"),
    ],
)
def test_path_objects_of_every_python_are_read_as_text(class_name: str, parts: list[str], expected: str) -> None:
    """Python 3.13 pickles paths under another module, and Windows has other paths; both are text to us."""

    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    module, name = class_name.split()
    path = b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(map(text, parts)) + b"tR"
    data = dcp_metadata.encode(dcp_metadata.Checkpoint({}, checkpoint_id="HERE"))
    assert data.count(text("HERE")) == 1
    assert dcp_metadata.decode(data.replace(text("HERE"), path)).checkpoint_id == expected
