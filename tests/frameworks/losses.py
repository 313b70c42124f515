"""
The whole of: what runs of a training script are compared by: the loss of each step, bit for bit, and the weights at the end.

Called from: the tests of this level. Each rank writes a line a step, so that a run which ends by os._exit has told all of its steps.
Must never: round a number.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def note(folder: Path, rank: int, step: int, loss: float) -> None:
    """Write the loss of one step."""
    with (folder / f"losses.{rank}").open("a") as file:
        file.write(json.dumps([step, float(loss).hex()]) + "\n")


def note_weights(folder: Path, rank: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the weights at the end. All ranks call it, as sharded ones are gathered. Of a quantized one it writes the tensors within."""
    whole = dict(plain for name, each in weights.items() for plain in _plain(name, each))
    torch.save({name: each.detach().clone() for name, each in whole.items()}, folder / f"weights.{rank}.pt")


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tensor, DTensor):
        yield name, tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor


def of(folder: Path, rank: int) -> list[tuple[int, str]]:
    """Every step and its loss."""
    return [(step, loss) for step, loss in map(json.loads, (folder / f"losses.{rank}").read_text().splitlines())]


def assert_equal(whole: Path, first: Path, second: Path, *, ranks: int, killed_at: int, resumed_from: int) -> None:
    """
    Assert that a run in two parts is the whole run: each step's loss, and the weights at the end.

    Args:
        whole: folder of the run without a break.
        first, second: folders of the parts.
        killed_at: the last step of the first part.
        resumed_from: the step behind which the second part begins.
    """
    for rank in range(ranks):
        expected, begun, resumed = of(whole, rank), of(first, rank), of(second, rank)
        assert [step for step, _ in expected] == list(range(1, len(expected) + 1))
        assert begun == expected[:killed_at]
        assert resumed == expected[resumed_from:]
        one, other = torch.load(whole / f"weights.{rank}.pt"), torch.load(second / f"weights.{rank}.pt")
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
