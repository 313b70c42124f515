"""
The whole of: the files that an export writes: header, shards and index, as safetensors and Hugging Face's tools read them; and the names in them.

Called from: pytest.
"""

import json
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch

from pillion_sidecar.cli import exporting, safetensors
from pillion_sidecar.cli.exits import Ended
from pillion_sidecar.storage import archive


def entry(name: str, num_items: int, dtype: str = "float32") -> safetensors.Entry:
    item_bytes = archive.SUPPORTED_DTYPES[dtype]
    return safetensors.Entry(name, dtype, (num_items,), item_bytes, num_items * item_bytes)


@pytest.mark.parametrize("dtype", safetensors.DTYPES)
def test_the_reference_reads_every_type(tmp_path: Path, dtype: str) -> None:
    """With the same type, shape and bytes; the file begins with a header of a multiple of 8 bytes."""
    data = bytes(range(48))
    num_items = len(data) // archive.SUPPORTED_DTYPES[dtype]
    if dtype == "bool":
        data = bytes(each % 2 for each in data)
    [shard] = safetensors.shards([entry("w", num_items, dtype)], max_shard_bytes=1000)
    head = safetensors.header(shard, {"step": "7"})
    assert len(head) % 8 == 0
    (tmp_path / shard.file).write_bytes(head + data)
    found = reference.load_file(tmp_path / shard.file)["w"]
    assert (found.dtype, found.shape) == (getattr(torch, dtype), (num_items,))
    assert bytes(found.view(torch.uint8).tolist()) == data


def test_files_end_before_the_size_and_no_tensor_is_cut() -> None:
    """A tensor that is larger than the size is a file by itself."""
    entries = [entry(name, size) for name, size in (("a", 10), ("b", 10), ("c", 100), ("d", 1), ("e", 19))]
    made = safetensors.shards(entries, max_shard_bytes=80)
    assert [[each.name for each in shard.entries] for shard in made] == [["a", "b"], ["c"], ["d", "e"]]
    assert [shard.file for shard in made] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    document = json.loads(safetensors.index(made))
    assert document["metadata"]["total_size"] == sum(each.num_bytes for each in entries)
    assert document["weight_map"]["c"] == "model-00002-of-00003.safetensors"
    assert list(document["weight_map"]) == ["a", "b", "c", "d", "e"]


def test_one_file_has_no_number() -> None:
    """Nothing to write is one empty file."""
    assert [shard.file for shard in safetensors.shards([entry("a", 1)], max_shard_bytes=1)] == ["model.safetensors"]
    assert [shard.file for shard in safetensors.shards([], max_shard_bytes=1)] == ["model.safetensors"]


def test_values_are_aligned_to_their_type() -> None:
    """Types of many bytes come first, also if their names come last."""
    [shard] = safetensors.shards(
        [entry("a", 3, "uint8"), entry("b", 1, "float64"), entry("c", 1, "bfloat16")], max_shard_bytes=99
    )
    assert [each.name for each in shard.entries] == ["b", "c", "a"]
    assert shard.starts() == [0, 8, 10]


def test_names_lose_and_get_a_prefix() -> None:
    """Names without the prefix keep all of theirs."""
    names = exporting.rename(["model.a", "other"], strip="model.", prefix="net.")
    assert names == {"model.a": "net.a", "other": "net.other"}


def test_two_tensors_never_get_one_name() -> None:
    """The text has both."""
    with pytest.raises(Ended, match=r"'model\.a' and 'a' would both be named 'a'"):
        exporting.rename(["model.a", "a"], strip="model.", prefix="")
