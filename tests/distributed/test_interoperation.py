"""
The whole of: what one world saved and another loads, by us and by stock DCP: FSDP2, DDP, DTensors of every placement.

Called from: pytest.
Must never: load into a state that already holds what was saved.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

from pillion import checkpointer
from pillion.errors import SaveError, UnsupportedLeaf
from process.ranks import Peer, Ranks
from support.deadlines import Deadline


class Training:
    """A model and its optimizer after some steps, under FSDP2 or DDP; the same weights in any world."""

    def __init__(self, parallel: str, seed: int) -> None:
        torch.manual_seed(seed)
        # 13 does not divide by any world size here: shards are uneven, and of 4 ranks one is empty in the last layer.
        self.network: nn.Module = nn.Sequential(nn.Linear(13, 13), nn.ReLU(), nn.BatchNorm1d(13), nn.Linear(13, 3))
        if parallel == "fsdp":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(self.network[0], mesh=mesh)
            fully_shard(self.network, mesh=mesh)
        elif parallel == "ddp":
            self.network = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)

    def step(self) -> None:
        self.network(torch.ones(4, 13)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.network, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def take(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of a state, gathered. Ranks: all."""
    found = {}

    def visit(path: str, value: object) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                visit(f"{path}.{key}", child)
        elif isinstance(value, DTensor):
            found[path] = value.full_tensor().clone()
        elif isinstance(value, torch.Tensor):
            found[path] = value.clone()

    visit("", state)
    return found


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def trained(parallel: str) -> Training:
    training = Training(parallel, seed=1)
    training.step()
    training.step()
    return training


def fresh(parallel: str) -> Training:
    """Other weights, and an optimizer whose state exists, as get_state_dict makes it."""
    return Training(parallel, seed=2)


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_what_a_world_saved_is_loaded_by_other_worlds_and_by_stock(ranks: Ranks, tmp_path: Path, parallel: str) -> None:
    """Two ranks save; two and three ranks load it bit for bit, by us, by stock dcp.load and as one torch.save file."""
    root = tmp_path / "root"

    def save(peer: Peer) -> dict[str, torch.Tensor]:
        training = trained(parallel)
        state = training.state()
        with checkpointer.Checkpointer(root) as opened:
            opened.save(state, 7).result(Deadline.COMMITTED.s)
        return whole(state)

    wanted = ranks.start(save, num_ranks=2).finish()[0]
    ranks.alone()

    def load(peer: Peer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with checkpointer.Checkpointer(root) as opened:
            ours = fresh(parallel)
            state = ours.state()
            assert opened.load(state) == 7
            ours.take(state)
            ours.step()
        stock = fresh(parallel)
        state = stock.state()
        dcp.load(state, checkpoint_id=root / "step-7")
        stock_state = whole(state)
        stock.take(state)
        stock.step()
        assert_equal(whole(ours.state()), whole(stock.state()))
        return stock_state, wanted

    for num_ranks in (2, 3):
        for found, _ in ranks.start(load, num_ranks=num_ranks).finish():
            assert_equal(found, wanted)
        ranks.alone()
    dcp_to_torch_save(root / "step-7", tmp_path / "one.pt")
    assert_equal(whole(torch.load(tmp_path / "one.pt", weights_only=False)), wanted)


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_what_stock_saved_is_loaded_by_us_in_any_world(ranks: Ranks, tmp_path: Path, parallel: str) -> None:
    """Stock dcp.save under two ranks; one, two and three ranks load the same values through a sidecar."""
    world_of = {1: "none", 2: parallel, 3: parallel}

    def save(peer: Peer) -> dict[str, torch.Tensor]:
        state = trained(parallel).state()
        dcp.save(state, checkpoint_id=tmp_path / "step-3")
        return whole(state)

    wanted = ranks.start(save, num_ranks=2).finish()[0]

    def load(peer: Peer) -> dict[str, torch.Tensor]:
        state = fresh(world_of[peer.world_size]).state()
        with checkpointer.Checkpointer(tmp_path) as opened:
            assert opened.load(state) == 3
        return whole(state)

    for num_ranks in (1, 2, 3):
        for found in ranks.start(load, num_ranks=num_ranks).finish():
            assert_equal(found, wanted)
        ranks.alone()


PLACEMENTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "rows": ((10, 6), [Shard(0), Replicate()]),
    "columns": ((6, 10), [Shard(1), Replicate()]),
    "both": ((7, 9), [Shard(0), Shard(1)]),
    "twice": ((9, 4), [Shard(0), Shard(0)]),
    "copies": ((5, 5), [Replicate(), Replicate()]),
    "copies first": ((5, 8), [Replicate(), Shard(1)]),
    "one row": ((1, 4), [Shard(0), Shard(0)]),
    "nothing": ((0, 4), [Shard(0), Replicate()]),
}


def placed(factor: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2))
    return {
        name: distribute_tensor(torch.arange(0, torch.Size(shape).numel()).view(shape) * factor, mesh, placements)
        for name, (shape, placements) in PLACEMENTS.items()
    }


def test_every_placement_is_saved_once_and_loaded_under_every_other(ranks: Ranks, tmp_path: Path) -> None:
    """Uneven, empty, doubly sharded and replicated DTensors of a 2x2 mesh come back on it, on one rank, and through stock."""

    def save(peer: Peer) -> tuple[dict[str, torch.Tensor], int]:
        state = placed(2.0)
        with checkpointer.Checkpointer(tmp_path) as opened:
            size = opened.save(state, 1).result(Deadline.COMMITTED.s).size_bytes
            again = placed(0.0)
            assert opened.load(again) == 1
            assert_equal(whole(again), whole(state))
        stock = placed(0.0)
        dcp.load(stock, checkpoint_id=tmp_path / "step-1")
        assert_equal(whole(stock), whole(state))
        return whole(state), size

    wanted = ranks.start(save, num_ranks=4).finish()[0][0]
    ranks.alone()
    opened = ranks.open(tmp_path)
    found = {name: torch.full(shape, -1.0) for name, (shape, _) in PLACEMENTS.items()}
    assert opened.load(found) == 1
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[f".{name}"]), name


def test_a_dtensor_that_cannot_be_written_is_refused_by_name_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    """A sum that was not taken, and shards that wrap other tensors, fail save and load with their name; the next save is committed."""

    def save(peer: Peer) -> list[str]:
        mesh = init_device_mesh("cpu", (2,))
        wrapper = TwoTensor(torch.ones(2, 4), torch.ones(2, 4))
        refused = {
            "sum": DTensor.from_local(torch.ones(3), mesh, [Partial()]),
            "low": DTensor.from_local(wrapper, mesh, [Shard(0)], run_check=False),
        }
        found = []
        with checkpointer.Checkpointer(tmp_path) as opened:
            for step, (name, tensor) in enumerate(refused.items(), 1):
                error = opened.save({"model": {name: tensor}}, step).committed.exception(Deadline.COMMITTED.s)
                assert isinstance(error, UnsupportedLeaf)
                found.append(error.fqn)
            opened.save({"model": {"one": torch.ones(3)}}, 3).result(Deadline.COMMITTED.s)
            with pytest.raises(UnsupportedLeaf, match=r"'model\.low'"):
                opened.load({"model": {"low": refused["low"]}})
        return found

    assert ranks.start(save, num_ranks=2).finish() == [["model.sum", "model.low"]] * 2


@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")
def test_a_sharded_tensor_of_the_old_kind_is_saved_and_loaded(ranks: Ranks, tmp_path: Path) -> None:
    """ShardedTensors with one, two and no local shards on a rank go through us and come back through us and through stock."""
    from torch.distributed import _shard
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec, EnumerableShardingSpec

    def make(factor: float) -> dict[str, Any]:
        even = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
        owners = {0: 1, 2: 1, 4: 0}
        tables = [ShardMetadata([row, 0], [2, 5], f"rank:{owner}/cpu") for row, owner in owners.items()]
        one_sided = [ShardMetadata([row, 0], [2, 5], "rank:1/cpu") for row in (0, 2, 4)]
        made = {
            "even": _shard.sharded_tensor.empty(even, 6, 5),
            "tables": _shard.sharded_tensor.empty(EnumerableShardingSpec(tables), 6, 5),
            "one sided": _shard.sharded_tensor.empty(EnumerableShardingSpec(one_sided), 6, 5),
        }
        for sharded in made.values():
            for shard in sharded.local_shards():
                first, rows = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
                shard.tensor.copy_(torch.arange(30.0).view(6, 5)[first : first + rows] * factor)
        return made

    def shards(state: dict[str, Any]) -> dict[str, list[list[float]]]:
        return {
            name: [shard.tensor.flatten().tolist() for shard in sharded.local_shards()]
            for name, sharded in state.items()
        }

    def save(peer: Peer) -> list[int]:
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.save(make(1.0), 1).result(Deadline.COMMITTED.s)
            ours, stock = make(0.0), make(0.0)
            assert opened.load(ours) == 1
        dcp.load(stock, checkpoint_id=tmp_path / "step-1")
        assert shards(ours) == shards(stock) == shards(make(1.0))
        return [len(sharded.local_shards()) for sharded in ours.values()]

    assert ranks.start(save, num_ranks=2).finish() == [[1, 1, 0], [1, 2, 3]]


def test_keys_and_their_order_may_differ_from_rank_to_rank(ranks: Ranks, tmp_path: Path) -> None:
    """Each rank's own keys are in the one checkpoint, in whatever order it has them; each rank loads its own."""

    def make(rank: int, value: float) -> dict[str, Any]:
        shared = {"a": torch.full((3,), value), "b": torch.full((4,), value + 1)}
        names = sorted(shared, reverse=bool(rank))
        return {f"only{rank}": {"x": torch.full((rank + 1,), value)}, **{name: shared[name] for name in names}}

    def save(peer: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.save(make(peer.rank, 5.0), 1).result(Deadline.COMMITTED.s)
            found = make(peer.rank, 0.0)
            assert opened.load(found) == 1
        assert_equal(whole(found), whole(make(peer.rank, 5.0)))

    ranks.start(save, num_ranks=3).finish()
    everything: dict[str, Any] = {f"only{rank}": {"x": torch.zeros(rank + 1)} for rank in range(3)}
    dcp.load(everything, checkpoint_id=tmp_path / "step-1")
    assert all(float(everything[f"only{rank}"]["x"][0]) == 5.0 for rank in range(3))


def test_ranks_that_disagree_on_a_tensor_fail_the_save_on_both_with_its_name(ranks: Ranks, tmp_path: Path) -> None:
    """Another shape on another rank is no checkpoint: each handle says which tensor, nothing is on storage."""

    def save(peer: Peer) -> str:
        with checkpointer.Checkpointer(tmp_path) as opened:
            error = opened.save({"w": torch.ones(3 + peer.rank)}, 1).committed.exception(Deadline.COMMITTED.s)
            assert isinstance(error, SaveError)
            opened.save({"w": torch.ones(3)}, 2).result(Deadline.COMMITTED.s)
            return error.failures[peer.rank].message

    assert all("'w'" in message for message in ranks.start(save, num_ranks=2).finish())
    assert not (tmp_path / "step-1").exists()
