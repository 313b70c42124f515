"""
Whether other versions of torch read what we write: run by hand when torch brings a version, or the writer changes.

    python tools/check_metadata_classes.py --python /path/to/other/venv/bin/python ... [--unpacked DIR ...]

It makes one checkpoint with our own head, tail and `.metadata`, and one with the stock `dcp.save` of the torch it runs
on. In a process of its own for each version it unpickles both `.metadata` files and loads our checkpoint with that
version's `dcp.load`. `--unpacked` takes the directory of an unpacked wheel, of which only
`torch/distributed/checkpoint/metadata.py` is executed, on top of the running torch: that checks the unpickling and no
more. What it prints as facts is what tests/unit/sidecar/storage/test_dcp_metadata.py keeps in a table.

It exits with 1 when a version does not read ours. It must never write outside its temporary directory.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from pillion_sidecar.storage import archive, dcp_metadata

PROBE_TIMEOUT_S: Final = 300.0
"""For one version: importing torch from a cold disk takes most of it."""

NOT_IN_2_6: Final = frozenset({"bcomplex32", "float4_e2m1fn_x2", "float8_e8m0fnu"})
"""Dtypes that the oldest torch does not have. A checkpoint with one of them cannot be read there, whoever wrote it."""

# Runs under the other interpreter, so it stands on that torch and the standard library alone.
PROBE: Final = r"""
import dataclasses, importlib.util, json, pickle, sys, warnings
warnings.simplefilter("ignore")
job = json.loads(sys.argv[1])
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
if job["metadata_py"]:
    spec = importlib.util.spec_from_file_location("torch.distributed.checkpoint.metadata", job["metadata_py"])
    metadata = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = metadata
    spec.loader.exec_module(metadata)

def attempt(action):
    try:
        return action() or "yes"
    except Exception as err:
        return f"no: {type(err).__name__}: {err}"

def unpickle(path):
    with open(path, "rb") as file:
        read = pickle.load(file)
    assert type(read) is metadata.Metadata
    for leaf in read.state_dict_metadata.values():
        repr(leaf)

def load():
    if job["metadata_py"]:
        return "not tried"
    into = {}
    for fqn, (dtype, sizes) in job["leaves"].items():
        into[fqn] = torch.ones(sizes, dtype=torch.uint8).to(getattr(torch, dtype))
    dcp.load(into, checkpoint_id=job["checkpoint"])
    for fqn, tensor in into.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.reshape(-1)
        assert not raw.any(), fqn
    return f"yes, all {len(into)} dtypes"

names = lambda cls: [field.name for field in dataclasses.fields(cls)]
properties = metadata.TensorProperties()
print(json.dumps({
    "torch": job["metadata_py"] or torch.__version__,
    "ours": attempt(lambda: unpickle(job["ours"])),
    "stock": attempt(lambda: unpickle(job["stock"])),
    "load": attempt(load),
    "facts": {
        "arity": len(properties.__getstate__()),
        "storage_info": names(filesystem._StorageInfo),
        "metadata": names(metadata.Metadata),
        "storage_meta": names(metadata.StorageMeta),
    },
}))
"""


@dataclasses.dataclass(frozen=True)
class Samples:
    ours: Path
    stock: Path
    leaves: dict[str, tuple[str, tuple[int, ...]]]


def make_samples(scratch: Path) -> Samples:
    """One zero-filled tensor of each dtype by our own hand, and a stock checkpoint of the torch that runs here."""
    leaves: dict[str, tuple[str, tuple[int, ...]]] = {
        f"model.{dtype}": (dtype, (2, 3)) for dtype in archive.SUPPORTED_DTYPES if dtype not in NOT_IN_2_6
    }
    ours = scratch / "ours"
    ours.mkdir()
    content = bytearray()
    entries: dict[str, dcp_metadata.TensorEntry | dcp_metadata.BytesEntry] = {}
    for fqn, (dtype, sizes) in leaves.items():
        payload_bytes = archive.SUPPORTED_DTYPES[dtype] * math.prod(sizes)
        length = archive.archive_bytes(payload_bytes)
        chunk = dcp_metadata.Chunk((0, 0), sizes, "__0_0.1.distcp", len(content), length)
        entries[fqn] = dcp_metadata.TensorEntry(dtype, sizes, (chunk,))
        content += archive.head(dtype, sizes, payload_bytes)
        content += bytes(length - archive.HEAD_BYTES - archive.TAIL_BYTES)
        content += archive.tail(dtype, sizes, payload_bytes)
    (ours / "__0_0.1.distcp").write_bytes(content)
    mappings: dict[str, tuple[str | int, ...]] = {fqn: (fqn,) for fqn in leaves}
    encoded = dcp_metadata.encode(dcp_metadata.Checkpoint(entries, mappings, checkpoint_id="step-1", save_id="1"))
    (ours / ".metadata").write_bytes(encoded)

    stock = scratch / "stock"
    save = (
        "import sys, warnings; warnings.simplefilter('ignore'); import torch, torch.distributed.checkpoint as dcp;"
        "dcp.save({'w': torch.zeros(2, 3), 'step': 1}, checkpoint_id=sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", save, str(stock)], check=True, timeout=PROBE_TIMEOUT_S)
    return Samples(ours, stock, leaves)


def probe(python: str, metadata_py: Path | None, samples: Samples) -> dict[str, Any]:
    """What one version says; raises CalledProcessError when its torch cannot be imported."""
    job = {
        "metadata_py": None if metadata_py is None else str(metadata_py),
        "ours": str(samples.ours / ".metadata"),
        "stock": str(samples.stock / ".metadata"),
        "checkpoint": str(samples.ours),
        "leaves": samples.leaves,
    }
    done = subprocess.run(
        [python, "-c", PROBE, json.dumps(job)], check=True, stdout=subprocess.PIPE, text=True, timeout=PROBE_TIMEOUT_S
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether other versions of torch read the metadata that we write.")
    parser.add_argument("--python", nargs="*", default=[], help="interpreters that have a torch")
    parser.add_argument("--unpacked", nargs="*", default=[], type=Path, help="directories of unpacked torch wheels")
    options = parser.parse_args(arguments)
    targets: list[tuple[str, Path | None]] = [(python, None) for python in (sys.executable, *options.python)]
    targets += [
        (sys.executable, unpacked / "torch/distributed/checkpoint/metadata.py") for unpacked in options.unpacked
    ]
    unread = 0
    with tempfile.TemporaryDirectory() as scratch:
        samples = make_samples(Path(scratch))
        for python, metadata_py in targets:
            answer = probe(python, metadata_py, samples)
            for name in ("torch", "ours", "load", "stock", "facts"):
                print(f"{name:>6}: {answer[name]}")
            print()
            unread += not (answer["ours"] == "yes" and answer["load"].startswith(("yes", "not tried")))
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
