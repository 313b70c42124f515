"""The archive around a payload: what stock torch.load reads from it, for every dtype and shape, and past 4 GiB."""

import ctypes
import io
import math
import pickletools
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pillion_sidecar.storage import archive

# Empty tensors of these dtypes warn once per process that they are experimental.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning", "ignore:BComplex32:UserWarning")

SHAPES = ((), (1,), (0,), (3, 5), (2, 0, 3), (300, 3), (70_000,), (1,) * 40)


def build(dtype: str, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """A payload, and the archive around it as the arena holds it; what lies between payload and tail is not zero."""
    payload = bytes(index % 2 for index in range(math.prod(sizes) * archive.SUPPORTED_DTYPES[dtype]))
    padding = b"\xee" * (-len(payload) % archive.ALIGNMENT)
    head = archive.head(dtype, sizes, len(payload))
    return payload, head + payload + padding + archive.tail(dtype, sizes, len(payload))


def payload_of(tensor: torch.Tensor) -> bytes:
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


@pytest.mark.parametrize("dtype", sorted(archive.SUPPORTED_DTYPES))
def test_stock_torch_load_reads_every_dtype(dtype: str) -> None:
    """What is laid by hand loads, weights only, as a contiguous tensor of the dtype and shape with the same bytes."""
    if not hasattr(torch, dtype):
        pytest.skip(f"torch {torch.__version__} has no {dtype}")
    for sizes in SHAPES:
        payload, content = build(dtype, sizes)
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        assert tensor.dtype is getattr(torch, dtype)
        assert tuple(tensor.shape) == sizes
        assert tensor.stride() == torch.empty(sizes, dtype=tensor.dtype).stride()
        assert not tensor.requires_grad
        assert payload_of(tensor) == payload


@pytest.mark.parametrize("dtype", sorted(archive.SUPPORTED_DTYPES))
def test_the_pickle_refers_to_what_torch_save_refers_to(dtype: str) -> None:
    """The names in data.pkl are those that torch.save writes for the dtype: what reads stock files has them."""
    if not hasattr(torch, dtype):
        pytest.skip(f"torch {torch.__version__} has no {dtype}")
    stock = io.BytesIO()
    torch.save(torch.empty(2, dtype=getattr(torch, dtype)), stock)
    _, ours = build(dtype, (2,))

    def names(file: io.BytesIO) -> list[object]:
        with zipfile.ZipFile(file) as opened:
            data_pickle = opened.read("archive/data.pkl")
        return [argument for opcode, argument, _ in pickletools.genops(data_pickle) if opcode.name == "GLOBAL"]

    assert names(io.BytesIO(ours)) == names(stock)


def test_every_dtype_that_stock_dcp_stores_is_known() -> None:
    """No dtype that the installed torch can save and plan for is missing, so that a new one is noticed here."""
    missing = []
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        # Quantized tensors carry a scale beside their bytes.
        if str(dtype).startswith(("torch.qint", "torch.quint")):
            continue
        try:
            stock = io.BytesIO()
            torch.save(torch.empty(2, dtype=dtype), stock)
            torch._utils._element_size(dtype)  # DCP's planner asks it; the bits dtypes fail here
        except (KeyError, RuntimeError, TypeError):
            continue
        if dtype.itemsize != archive.SUPPORTED_DTYPES.get(str(dtype).removeprefix("torch.")):
            missing.append(dtype)
    assert missing == []


@given(
    sizes=st.lists(st.integers(min_value=0, max_value=4), max_size=6).map(tuple),
    dtype=st.sampled_from(["float32", "uint16", "bool", "complex128"]),
)
def test_the_parts_have_their_sizes_and_other_readers_open_the_whole(sizes: tuple[int, ...], dtype: str) -> None:
    """Head and tail fill their rooms exactly, the payload is aligned, and the standard library finds all entries."""
    payload, content = build(dtype, sizes)
    assert len(archive.head(dtype, sizes, len(payload))) == archive.HEAD_BYTES
    assert len(archive.tail(dtype, sizes, len(payload))) == archive.TAIL_BYTES
    assert archive.archive_bytes(len(payload)) == len(content)
    assert len(content) % archive.ALIGNMENT == 0
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        assert opened.namelist() == ["archive/data.pkl", "archive/version", "archive/byteorder", "archive/data/0"]
        assert opened.read("archive/version") == b"3\n"
        assert opened.read("archive/byteorder") == b"little"
        entry = opened.getinfo("archive/data/0")
        assert (entry.file_size, entry.compress_size, entry.CRC) == (len(payload), len(payload), 0)
        assert entry.header_offset + 30 + len(entry.filename) < archive.HEAD_BYTES


def test_archives_that_follow_each_other_in_a_file_are_read_by_their_slices(tmp_path: Path) -> None:
    """A reader that is given an offset and a length, as DCP's is, gets each tensor of a file that holds several."""
    first, second = build("int64", (4,)), build("float8_e5m2", (7,))
    (tmp_path / "file").write_bytes(first[1] + second[1])
    with (tmp_path / "file").open("rb") as file:
        file.seek(len(first[1]))
        tensor = torch.load(io.BytesIO(file.read(len(second[1]))), weights_only=True)
    assert tensor.dtype is torch.float8_e5m2
    assert payload_of(tensor) == second[0]


@pytest.mark.parametrize(
    "payload_bytes",
    [2**32 - 4096, 2**32 - 64 - archive.HEAD_BYTES, 2**32 - 64, 2**32 - 1, 2**32, 5 * 2**30 + 3],
    ids=["all 32 bits", "directory near the limit", "directory past it", "payload at it", "payload past it", "odd"],
)
def test_torch_and_the_standard_library_read_archives_past_4_gib(payload_bytes: int, tmp_path: Path) -> None:
    """ZIP64 begins where a field no longer fits: the last bytes of a payload of 4 GiB are where they belong."""
    sizes = (payload_bytes,)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(archive.head("uint8", sizes, payload_bytes))
        file.seek(archive.HEAD_BYTES + payload_bytes - 3)
        file.write(b"end")
        file.seek(archive.archive_bytes(payload_bytes) - archive.TAIL_BYTES)
        file.write(archive.tail("uint8", sizes, payload_bytes))
        assert file.tell() == archive.archive_bytes(payload_bytes)
    tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    assert tuple(tensor.shape) == sizes
    assert bytes(tensor[-3:].tolist()) == b"end"
    assert tensor.data_ptr() % archive.ALIGNMENT == 0
    with zipfile.ZipFile(path) as opened:
        assert opened.getinfo("archive/data/0").file_size == payload_bytes


@given(position=st.integers(min_value=0, max_value=49), dtype=st.sampled_from(["float8_e8m0fnu", "float4_e2m1fn_x2"]))
def test_fifty_dimensions_always_fit(position: int, dtype: str) -> None:
    """The head has room for 50 dimensions, wherever the large one is, of the dtypes with the longest names."""
    sizes = (1,) * position + (2**40,) + (1,) * (49 - position)
    assert len(archive.head(dtype, sizes, 2**40)) == archive.HEAD_BYTES


@pytest.mark.parametrize("part", [archive.head, archive.tail])
def test_a_dtype_that_is_not_known_is_refused_by_name(part: object) -> None:
    """A dtype that stock DCP could not load again never reaches the storage; the error names it."""
    assert callable(part)
    with pytest.raises(ValueError, match="'bits8'"):
        part("bits8", (1,), 1)


def test_a_shape_that_does_not_fit_is_refused_by_name() -> None:
    """A shape whose description needs more room than the head has is an error, not a broken archive."""
    with pytest.raises(ValueError, match="too many dimensions"):
        archive.head("uint8", (1,) * 300, 1)


def test_a_shape_and_a_size_that_disagree_are_refused() -> None:
    """A payload shorter or longer than its shape says would be read past its end, or in part."""
    for payload_bytes in (0, 20, 28):
        with pytest.raises(ValueError, match="24 bytes"):
            archive.head("float32", (2, 3), payload_bytes)
    with pytest.raises(ValueError, match="negative"):
        archive.head("float32", (-2, -3), 24)
    with pytest.raises(ValueError, match="negative"):
        archive.archive_bytes(-1)
