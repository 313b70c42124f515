"""
The whole of: what becomes of the executor when it cannot start, and when a plugged-in writer fails.

Called from: pytest.
Must never: leave a sidecar behind (the fixture `ranks` ends them).
"""

import os
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as stock

import pillion
from pillion import dcp
from process.ranks import Peer, Ranks, status
from support import writers
from support.deadlines import Deadline
from support.processes import Processes

TESTS = str(Path(__file__).parents[1])
COMMIT_S = Deadline.COMMITTED.s


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((3, 5), float(value)), "names": ["a", "b"]}, "step": int(value)}


def blank() -> dict[str, Any]:
    return {"model": {"w": torch.zeros(3, 5), "names": []}, "step": -1}


def test_an_executor_that_cannot_initialise_says_why_and_the_next_save_has_a_fresh_one(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a preload is the error of the save, by its own type; once it is mended the next save is committed."""
    modules = tmp_path / "modules"
    modules.mkdir()
    broken = tmp_path / "broken"
    broken.touch()
    (modules / "preload_probe.py").write_text(
        f"import os\nif os.path.exists({str(broken)!r}):\n    raise ZeroDivisionError('no such accelerator')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.setenv("PILLION_PRELOAD", "preload_probe")
    checkpointer = ranks.open(tmp_path / "root")

    with pytest.raises(pillion.SaveError) as told:
        checkpointer.save(state(1), 1).result(COMMIT_S)
    assert {rank: failure.type_name for rank, failure in told.value.failures.items()} == {0: "ZeroDivisionError"}
    assert told.value.failures[0].message == "no such accelerator"
    assert "preload_probe" in told.value.failures[0].traceback_text
    died = told.value.failures[0].pid

    broken.unlink()
    checkpointer.save(state(2), 2).result(COMMIT_S)
    assert status(checkpointer)["executor_pid"] not in (None, died)
    assert (tmp_path / "root" / "step-2" / ".metadata").exists()
    assert not (tmp_path / "root" / "step-1").exists()


def test_a_writer_that_fails_once_says_so_and_the_same_executor_serves_the_next_save(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's writer fails: its text is on the handle; the next save is committed by the process that failed."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    broken = tmp_path / "broken"
    broken.touch()
    root = tmp_path / "root"
    arguments = {"faults": {"write_data": [0]}, "error": "Refusal", "as_long_as": str(broken)}
    checkpointer = ranks.open(
        root,
        storage={"writer": {"name": "support.writers:Recorder", "arguments": arguments}},
        retention={"keepLast": 1},
    )

    with pytest.raises(pillion.PersistError, match="Refusal: write_data fails on 0") as told:
        checkpointer.save(state(1), 1).result(COMMIT_S)
    executor = status(checkpointer)["executor_pid"]
    assert told.value.failures[0].pid == executor
    assert "in enter" in told.value.failures[0].traceback_text
    assert not (root / "step-1" / ".metadata").exists()

    broken.unlink()
    checkpointer.save(state(2), 2).result(COMMIT_S)
    checkpoint = checkpointer.save(state(3), 3).result(COMMIT_S)
    assert status(checkpointer)["executor_pid"] == executor
    assert checkpoint.path == str(root / "step-3")
    assert checkpoint.size_bytes > 0
    assert not (root / "step-2").exists(), "retention.keepLast holds for a plugged-in writer's checkpoints too"
    loaded = blank()
    stock.load(loaded, checkpoint_id=checkpoint.path, no_dist=True)
    assert torch.equal(loaded["model"]["w"], state(3)["model"]["w"])
    assert (loaded["model"]["names"], loaded["step"]) == (["a", "b"], 3)
    restored = blank()
    assert checkpointer.load(restored) == 3
    assert checkpointer.last_load is not None
    assert (checkpointer.last_load.tier, checkpointer.last_load.refused) == ("arena", {})
    assert torch.equal(restored["model"]["w"], state(3)["model"]["w"])


def test_a_writer_is_called_in_the_order_of_stock_dcp(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a writer notes down in the executor is what it notes down under stock `dcp.save`."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    logs = [tmp_path / "stock-log", tmp_path / "log"]
    for log in logs:
        log.mkdir()
    stock.save(
        state(1), checkpoint_id=tmp_path / "stock", storage_writer=writers.Recorder(log=str(logs[0])), no_dist=True
    )

    def body(_: Peer) -> None:
        os.chdir(tmp_path)
        writer = dcp.Writer("support.writers:Recorder", {"log": str(logs[1])})
        dcp.async_save(state(1), checkpoint_id="ours", storage_writer=writer).result(COMMIT_S)
        dcp.close()

    ranks.start(body).finish()
    assert writers.hooks_of(logs[1], 0) == writers.hooks_of(logs[0], 0) == list(writers.HOOKS)
    ours = stock.FileSystemReader(tmp_path / "ours").read_metadata()
    theirs = stock.FileSystemReader(tmp_path / "stock").read_metadata()
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data == theirs.storage_data


def test_close_waits_for_what_is_in_flight_and_a_later_save_opens_anew(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dcp.close` waits for what is in flight, and each future is done after it; a later save opens anew."""
    monkeypatch.setenv("PYTHONPATH", TESTS)

    def body(_: Peer) -> list[bool]:
        os.chdir(tmp_path)
        saves: list[futures.Future[Any]] = [dcp.async_save(state(i), checkpoint_id=f"c{i}") for i in range(3)]
        dcp.close()
        done = [save.done() and save.exception() is None for save in saves]
        dcp.async_save(state(3), checkpoint_id="c3").result(COMMIT_S)
        dcp.close()
        return done

    assert ranks.start(body).finish() == [[True, True, True]]
    saves = set()
    for number in range(4):
        ids = stock.FileSystemReader(tmp_path / f"c{number}").read_metadata().storage_meta
        assert ids is not None
        assert ids.checkpoint_id == str(tmp_path / f"c{number}")
        saves.add(ids.save_id)
        loaded = blank()
        stock.load(loaded, checkpoint_id=tmp_path / f"c{number}", no_dist=True)
        assert torch.equal(loaded["model"]["w"], state(number)["model"]["w"])
    assert len(saves - {None}) == 4


def test_an_interpreter_that_ends_with_a_save_in_flight_drains_it(processes: Processes, tmp_path: Path) -> None:
    """A script whose last line is an `async_save` ends with status 0, and its checkpoint is committed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "from pillion import dcp\n"
        "os.chdir(sys.argv[1])\n"
        "dcp.async_save({'w': torch.arange(6.0)}, checkpoint_id='last')\n"
    )
    processes.python(script, tmp_path).check(Deadline.SCRIPT)
    loaded = {"w": torch.zeros(6)}
    stock.load(loaded, checkpoint_id=tmp_path / "last", no_dist=True)
    assert torch.equal(loaded["w"], torch.arange(6.0))
