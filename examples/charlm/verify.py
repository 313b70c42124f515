"""
The whole of: reading a checkpoint without Pillion, in any world, and comparing it with the state that it should hold.

Called from: demo.py, as one plain process or under torchrun with any number of ranks; also by a person.
Must never: import pillion. A checkpoint has to be readable by stock torch.distributed.checkpoint alone.
"""

import argparse
import inspect
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed

import training


def main() -> int:
    """
    Exit status 0 when every tensor and value is equal bit for bit.
    """
    parser = argparse.ArgumentParser(description="Load a checkpoint with stock DCP and compare it.")
    parser.add_argument("--checkpoint", required=True, help="a directory, or the URL of a folder in a bucket of S3")
    parser.add_argument("--final", type=Path, required=True, help="what train.py --final wrote")
    args = parser.parse_args()
    if "://" in args.checkpoint:
        read_s3_by_obstore()
    training.be_deterministic()
    in_group = "RANK" in os.environ
    rank = training.join() if in_group else 0

    # Another seed: nothing that is compared below can be equal by chance.
    run = training.build("fsdp" if in_group else "none", seed=99, num_steps=1)
    state_dict = {name: part for name, part in run.state_dict(rank).items() if name in ("model", "optimizer")}
    # torch 2.6 has no such argument, and loads alone where there is no group.
    alone = {"no_dist": True} if not in_group and "no_dist" in inspect.signature(dcp.load).parameters else {}
    dcp.load(state_dict, checkpoint_id=args.checkpoint, **alone)
    generator = torch.get_rng_state()
    run.load_state_dict({**run.state_dict(rank), **state_dict, "generator": {f"rank{rank}": generator}}, rank)
    whole = run.whole()

    status = 0
    if rank == 0:
        expected = torch.load(args.final, weights_only=True)
        different = list(differences(whole, expected))
        for name in different:
            print(f"differs: {name}", file=sys.stderr)
        status = 1 if different else 0
    if in_group:
        distributed.destroy_process_group()
    return status


def read_s3_by_obstore() -> None:
    """
    DCP reads a URL through fsspec. Without s3fs, fsspec does not know s3://, so this function registers obstore for it.
    """
    from fsspec import get_filesystem_class  # type: ignore[import-untyped] # it has no types
    from obstore.fsspec import register

    register("s3")
    # torch.load jumps about in each tensor's archive, and obstore's files ask anew at each jump: one request for an object is much faster.
    get_filesystem_class("s3")._open = lambda self, path, *_, **__: io.BytesIO(self.cat_file(path))


def differences(one: Any, other: Any, name: str = "state") -> Iterator[str]:
    """
    The names of what is not equal bit for bit in two nested structures of dicts, lists, tensors and values.
    """
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        if not alike or not torch.equal(as_bytes(one), as_bytes(other)):
            yield name
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys(), key=str):
            if key not in one or key not in other:
                yield f"{name}.{key} (only in one)"
            else:
                yield from differences(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{name}[{index}]")
    elif one != other:
        yield name


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """
    Bits rather than numbers: NaN is equal to itself, and -0.0 is not 0.0.
    """
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    sys.exit(main())
