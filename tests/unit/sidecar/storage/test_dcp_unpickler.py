"""What a `.metadata` file may do to the process that reads it: name what the format needs, and nothing more."""

import collections
import contextlib
import copyreg
import dataclasses
import os
import pathlib
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem, metadata

from pillion_sidecar.storage import dcp_metadata

METADATA: Final = "torch.distributed.checkpoint.metadata"

SMALL: Final = dcp_metadata.Checkpoint(
    entries={
        "model.w": dcp_metadata.TensorEntry(
            "float32", (6, 4), (dcp_metadata.Chunk((0, 0), (6, 4), "__0_0.1.distcp", 0, 2048),)
        ),
        "step": dcp_metadata.BytesEntry("__0_0.1.distcp", 4096, 300),
    },
    mappings={"model.w": ("model", "w"), "step": ("step",)},
    checkpoint_id="step-3",
)
OURS: Final = dcp_metadata.encode(SMALL)


def honest() -> metadata.Metadata:
    """SMALL in stock DCP's classes, to be changed and pickled by the standard pickler."""
    read = pickle.loads(OURS)
    assert isinstance(read, metadata.Metadata)
    return read


class Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "function", [os.system, eval, subprocess.call, pathlib.Path.touch, collections.deque, sys.exit], ids=repr
)
def test_a_pickle_that_calls_anything_is_refused_before_it_does(function: Any, protocol: int, tmp_path: Path) -> None:
    """A name that the format does not need is refused by name, whatever the protocol, and nothing ran."""
    witness = tmp_path / "witness"
    data = pickle.dumps(Runs(function, f"touch {witness}"), protocol)
    with pytest.raises(ValueError, match="refused: the file refers to"):
        dcp_metadata.decode(data)
    assert not witness.exists()


def test_a_call_hidden_in_an_honest_file_is_refused_before_it_happens(tmp_path: Path) -> None:
    """A stock Metadata that carries one foreign object is refused as a whole; the object names itself in the error."""
    witness = tmp_path / "witness"
    carrier = honest()
    carrier.planner_data = Runs(os.system, f"touch {witness}")
    with pytest.raises(ValueError, match=r"posix\.system"):
        dcp_metadata.decode(pickle.dumps(carrier))
    assert not witness.exists()


def test_getattr_is_good_for_memory_formats_only() -> None:
    """The name is needed for files of early Python 3.11; it gives no way to anything else."""
    for owner, name in ((metadata.Metadata, "__init__"), (metadata._MEM_FORMAT_ENCODING, "mro"), ("", "format")):
        with pytest.raises(ValueError, match=r"builtins\.getattr"):
            dcp_metadata.decode(pickle.dumps(Runs(getattr, owner, name)))


@pytest.mark.parametrize(
    "target",
    [f"{METADATA}\nMetadata", "torch\nSize", "builtins\ngetattr", "collections\nOrderedDict", "torch\nfloat32"],
)
@pytest.mark.parametrize("attribute", ["a", "_function", "__setstate__"])
@pytest.mark.parametrize(("before", "after"), [(b"", b""), (b"N", b"\x86")], ids=["dict", "slots"])
def test_a_file_cannot_change_what_outlives_it(target: str, attribute: str, before: bytes, after: bytes) -> None:
    """State aimed at a class or function of ours, not at an instance, is an error and leaves no trace."""
    state = before + b"}X" + len(attribute).to_bytes(4, "little") + attribute.encode() + b"K\x01s" + after
    with pytest.raises(ValueError, match=r"not a \.metadata file"):
        dcp_metadata.decode(b"\x80\x02c" + target.encode() + b"\n" + state + b"b.")
    assert dcp_metadata.decode(OURS) == SMALL


def test_an_extension_code_is_refused() -> None:
    """Codes of the copyreg registry are another way to name a class, and no file of DCP has one."""
    copyreg.add_extension("posix", "system", 240)
    try:
        with pytest.raises(ValueError, match=r"not a \.metadata file"):
            dcp_metadata.decode(b"\x80\x02\x82\xf0.")
    finally:
        copyreg.remove_extension("posix", "system", 240)


def changed(**fields: object) -> bytes:
    return pickle.dumps(dataclasses.replace(honest(), **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not a .metadata file"),
        (b"garbage", "not a .metadata file"),
        (OURS[:-40], "not a .metadata file"),
        (pickle.dumps({"a": 1}), "the root is a dict"),
        (b"\x80\x02c" + f"{METADATA}\nMetadata\n)\x81.".encode("latin-1"), "the state of the root"),
        (changed(storage_data=None), "storage_data is a NoneType"),
        (changed(storage_data={}), "does not say where 'model.w' at "),
        (changed(planner_data={"a": ["a"]}), "the path of 'a' is a list"),
        (changed(planner_data={"a": (None,)}), "a key in the path of 'a' is a NoneType"),
        (changed(state_dict_metadata={"a": 3}), "the entry of 'a' is a int"),
        (changed(storage_data={metadata.MetadataIndex("a"): filesystem._StorageInfo("../a", 0, 1)}), "outside"),
        (changed(storage_data={metadata.MetadataIndex("a"): filesystem._StorageInfo("/a", 0, 1)}), "outside"),
        (changed(storage_data={metadata.MetadataIndex("a"): filesystem._StorageInfo("a", -1, 1)}), "-1 stands among"),
        (changed(storage_data={metadata.MetadataIndex("a"): filesystem._StorageInfo("a", 0, 1, ["zstd"])}), "zstd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_damaged_or_says_too_little_is_refused(data: bytes, match: str) -> None:
    """Every error is a ValueError that says what is wrong, so that the loader can go to the checkpoint before."""
    with pytest.raises(ValueError, match=match):
        dcp_metadata.decode(data)


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x7f", b"p2147483647\n"], ids=["LONG_BINPUT", "PUT"])
def test_a_large_memo_index_takes_no_memory(put: bytes) -> None:
    """One flipped byte must not cost the sidecar tens of GiB, which the interpreter's own unpickler allocates for it."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="the root is a dict"):
            dcp_metadata.decode(b"\x80\x02}" + put + b".")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "key",
    [b")" + b"\x85" * 300_000, b")" + b"2\x86" * 60, b"\x8f(K\x01\x90"],
    ids=["deep", "each holds the one before twice", "a set"],
)
def test_only_texts_numbers_and_instances_are_hashed(key: bytes) -> None:
    """A tuple of tuples as a key would end the process with SIGSEGV, or take 2**60 steps; it is refused before it is hashed."""
    with pytest.raises(ValueError, match=r"not a \.metadata file"):
        dcp_metadata.decode(b"\x80\x02}" + key + b"Ns.")


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"ctorch\nSize\n(", b"t\x85R."), (b"", b"NR."), (b"", b")R."), (b"", b")\x81.")],
    ids=["a size", "called with None", "called", "a class"],
)
def test_an_error_does_not_write_out_what_a_file_repeats(before: bytes, after: bytes) -> None:
    """Text of a value in which each tuple holds the one before twice would have 2**60 characters."""
    with pytest.raises(ValueError, match=r"not a \.metadata file") as caught:
        dcp_metadata.decode(b"\x80\x02" + before + b")" + b"2\x86" * 60 + after)
    assert len(str(caught.value)) < 1000


@given(position=st.integers(min_value=0), value=st.integers(min_value=0, max_value=255))
def test_a_flipped_byte_is_read_or_refused_and_never_anything_else(position: int, value: int) -> None:
    """Damage makes another checkpoint, or a ValueError: no other exception reaches the caller."""
    data = bytearray(OURS)
    position %= len(data)
    data[position] = value
    with contextlib.suppress(ValueError):
        assert isinstance(dcp_metadata.decode(bytes(data)), dcp_metadata.Checkpoint)
