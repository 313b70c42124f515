"""
The whole of: `pillion export` of what two ranks have saved in shards: the whole tensors come out, bit for bit; and a comparison with one rank's save.

Called from: pytest.
"""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as reference
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pillion import checkpointer
from pillion_sidecar.cli import main
from pillion_sidecar.cli.exits import Exit
from process.ranks import Peer, Ranks
from support.deadlines import Deadline


def whole(name: str) -> torch.Tensor:
    """Odd sizes, which two ranks cut unequally."""
    shapes = {"rows": (7, 5), "columns": (6, 9), "middle": (3, 5, 4), "replicated": (4,), "one": (1, 3)}
    shape = shapes[name]
    return (
        torch.arange(torch.Size(shape).numel())
        .reshape(shape)
        .to(torch.bfloat16 if name == "columns" else torch.float32)
    )


PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "middle": Shard(1), "replicated": Replicate(), "one": Shard(0)}


def test_shards_of_two_ranks_are_exported_whole(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut by rows, by columns and in the middle; and `diff` finds one rank's save of the same values equal, which is cut otherwise."""

    def two(peer: Peer) -> None:
        mesh = init_device_mesh("cpu", (peer.world_size,))
        with checkpointer.Checkpointer(tmp_path / "two") as opened:
            state = {name: distribute_tensor(whole(name), mesh, [placement]) for name, placement in PLACEMENTS.items()}
            opened.save({"model": state}, 1).result(Deadline.COMMITTED.s)

    def one(_: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path / "one") as opened:
            opened.save({"model": {name: whole(name) for name in PLACEMENTS}}, 1).result(Deadline.COMMITTED.s)
            changed: dict[str, Any] = {name: whole(name) for name in PLACEMENTS}
            changed["columns"][5, 8] = -1
            opened.save({"model": changed}, 2).result(Deadline.COMMITTED.s)

    ranks.start(two, num_ranks=2, pods="ab").finish()
    ranks.start(one).finish()
    ranks.alone()
    assert main.main(["export", str(tmp_path / "two"), "1", str(tmp_path / "hf"), "--strip", "model."]) == Exit.WELL
    loaded = reference.load_file(tmp_path / "hf" / "model.safetensors")
    assert loaded.keys() == PLACEMENTS.keys()
    for name, found in loaded.items():
        assert found.dtype == whole(name).dtype
        assert torch.equal(found, whole(name)), name
    assert main.main(["verify", str(tmp_path / "two")]) == Exit.WELL
    assert main.main(["diff", str(tmp_path / "two"), str(tmp_path / "one" / "step-1")]) == Exit.WELL
    capsys.readouterr()
    assert main.main(["diff", str(tmp_path / "two"), str(tmp_path / "one" / "step-2")]) == Exit.FOUND
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [["model.columns", "values"]]
