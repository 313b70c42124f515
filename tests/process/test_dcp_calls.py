"""
The whole of: `pillion.dcp`'s `save`, `load` and stagers of one rank, beside stock DCP's.

Called from: pytest.
Must never: leave a sidecar behind (the fixture `ranks` ends them).
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as stock
from torch.distributed.checkpoint import staging

import pillion
from pillion import dcp
from process.ranks import Peer, Ranks
from support.deadlines import Deadline

COMMIT_S = Deadline.COMMITTED.s


class Counter:
    """A `Stateful`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


class Halving(staging.BlockingAsyncStager):
    """Somebody's own stager: it changes what is saved."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if "refused" in state_dict:
            raise ValueError("no such state")
        return {name: value.half() if isinstance(value, torch.Tensor) else value for name, value in state_dict.items()}


def state(value: int) -> dict[str, Any]:
    return {"model": {"w": torch.arange(6.0) + value}, "counter": Counter(value), "note": ("text", value)}


def blank() -> dict[str, Any]:
    return {"model": {"w": torch.zeros(6)}, "counter": Counter(-1), "note": None}


def holds(found: dict[str, Any], value: int) -> bool:
    return (
        torch.equal(found["model"]["w"], torch.arange(6.0) + value)
        and found["counter"].value == value
        and found["note"] == ("text", value)
    )


def flip(directory: Path) -> None:
    """One bit of the tensor's bytes."""
    for path in directory.glob("*.distcp"):
        data = bytearray(path.read_bytes())
        at = data.find(state(1)["model"]["w"].numpy().tobytes())
        if at >= 0:
            data[at + 5] ^= 1
            path.write_bytes(data)


def test_save_and_load_of_dcp_go_through_the_sidecar(ranks: Ranks, tmp_path: Path) -> None:
    """What either of torch and Pillion saves the other one loads; what cannot be loaded is a CheckpointException that says why."""

    def body(_: Peer) -> dict[str, Any]:
        os.chdir(tmp_path)
        found: dict[str, Any] = {}
        saved = dcp.save(state(1), checkpoint_id="ours")
        assert isinstance(saved, pillion.Checkpoint)
        found["path"] = saved.path
        dcp.save(state(2), storage_writer=stock.FsspecWriter(f"file://{tmp_path}/fsspec"))
        stock.save(state(3), checkpoint_id="theirs", no_dist=True)
        for value, where in ((1, "ours"), (2, "fsspec"), (3, "theirs")):
            mine, torchs = blank(), blank()
            dcp.load(mine, checkpoint_id=where)
            stock.load(torchs, checkpoint_id=where, no_dist=True)
            found[where] = holds(mine, value) and holds(torchs, value)
        partial = {"more": torch.zeros(1), "model": {"w": torch.zeros(6)}}
        dcp.load(partial, checkpoint_id="ours", planner=stock.DefaultLoadPlanner(allow_partial_load=True))
        found["partial"] = torch.equal(partial["model"]["w"], torch.arange(6.0) + 1)  # type: ignore[index] # nested
        flip(tmp_path / "ours")
        for name, where, wanted in (
            ("nothing", "nothing", blank()),
            ("a file", __file__, blank()),
            ("missing", "theirs", {"more": torch.zeros(1)}),
            ("corrupt", "ours", blank()),
        ):
            with pytest.raises(dcp.CheckpointException) as raised:
                dcp.load(wanted, checkpoint_id=where)
            found[name] = {
                rank: (type(error).__name__, str(error)) for rank, (error, _) in raised.value.failures.items()
            }
        again = blank()
        dcp.load(again, checkpoint_id="theirs")
        dcp.save(state(4), checkpoint_id="ours")
        dcp.load(again, checkpoint_id="ours")
        found["again"] = holds(again, 4)
        dcp.close()
        return found

    (found,) = ranks.start(body).finish()
    assert found.pop("path") == str(tmp_path / "ours")
    errors = {name: found.pop(name) for name in ("nothing", "a file", "missing", "corrupt")}
    assert found == {"ours": True, "fsspec": True, "theirs": True, "partial": True, "again": True}
    assert {name: {rank: kind for rank, (kind, _) in of.items()} for name, of in errors.items()} == {
        "nothing": {0: "NoCheckpoint"},
        "a file": {0: "NoCheckpoint"},
        "missing": {0: "IncompatibleCheckpoint"},
        "corrupt": {0: "CorruptCheckpoint"},
    }
    assert "'more' is not in it" in errors["missing"][0][1]
    assert "does not match its digest" in errors["corrupt"][0][1]


def test_a_stager_decides_what_is_saved_and_what_is_returned(ranks: Ranks, tmp_path: Path) -> None:
    """One that stages beside the training is answered with both futures, and the next optimizer step waits for the copy; somebody's own
    is called, and what it raises is the save's failure."""

    def body(_: Peer) -> dict[str, Any]:
        os.chdir(tmp_path)
        found: dict[str, Any] = {}
        weights = torch.nn.Parameter(torch.zeros(300_000))
        optimizer = torch.optim.SGD([weights], lr=1.0)
        stager = staging.DefaultStager(staging.StagingOptions(False, False, True, False))
        for step in range(4):
            weights.grad = torch.full_like(weights, -1.0)
            optimizer.step()
            response = dcp.async_save({"w": weights}, checkpoint_id=f"beside{step}", async_stager=stager)
            assert isinstance(response, dcp.AsyncSaveResponse)
            if step % 2:
                response.staging_completion.result(COMMIT_S)
            found[f"beside{step}"] = response
        for step in range(4):
            found[f"beside{step}"] = str(found[f"beside{step}"].upload_completion.result(COMMIT_S).path)
        stager.close()
        halved = dcp.async_save({"w": torch.ones(3)}, checkpoint_id="halved", async_stager=Halving())
        assert not isinstance(halved, dcp.AsyncSaveResponse)
        halved.result(COMMIT_S)
        refused = dcp.async_save({"refused": 1}, checkpoint_id="refused", async_stager=Halving())
        assert not isinstance(refused, dcp.AsyncSaveResponse)
        error = refused.exception(COMMIT_S)
        assert isinstance(error, dcp.CheckpointException)
        found["refused"] = {rank: str(each) for rank, (each, _) in error.failures.items()}
        dcp.close()
        return found

    (found,) = ranks.start(body).finish()
    assert found == {f"beside{step}": str(tmp_path / f"beside{step}") for step in range(4)} | {
        "refused": {0: "ValueError: no such state"}
    }
    for step in range(4):
        loaded = {"w": torch.zeros(300_000)}
        stock.load(loaded, checkpoint_id=tmp_path / f"beside{step}", no_dist=True)
        assert torch.equal(loaded["w"], torch.full((300_000,), step + 1.0)), step
    half = {"w": torch.zeros(3, dtype=torch.float16)}
    stock.load(half, checkpoint_id=tmp_path / "halved", no_dist=True)
    assert torch.equal(half["w"], torch.ones(3, dtype=torch.float16))
