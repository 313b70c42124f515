"""
The whole of: `pillion.dcp.async_save` on several ranks, in one pod and in two, beside what stock DCP promises.

Called from: pytest.
Must never: run a collective in the test process (the ranks are forked from it).
"""

import contextlib
import json
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as stock
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import pillion
from pillion import dcp
from process.ranks import Peer, Ranks
from support import writers
from support.deadlines import Deadline

TESTS: Final = str(Path(__file__).parents[1])
COMMIT_S: Final = Deadline.COMMITTED.s
ONE_POD: Final = None
TWO_PODS: Final = ("a", "a", "b", "b")
UNSTAGED: Final = ({1}, {0, 3}, {0, 1, 2, 3})
"""Ranks that have a leaf that cannot be pickled."""
WHOLE: Final = torch.arange(7 * 3, dtype=torch.float32).view(7, 3)
"""Seven rows: four ranks hold 2, 2, 2 and 1 of them."""


class Counter:
    """A `Stateful`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def state(peer: Peer, value: float) -> dict[str, Any]:
    """Replicated, sharded and rank-dependent tensors, nested; a Stateful; plain Python values."""
    sharded: torch.Tensor = WHOLE + value
    if peer.world_size > 1:
        sharded = distribute_tensor(sharded, init_device_mesh("cpu", (peer.world_size,)), [Shard(0)])
    return {
        "model": {"replicated": torch.full((5,), float(value)), "layers": [{"sharded": sharded}]},
        "mine": {f"rank{peer.rank}": torch.full((2,), float(value + peer.rank))},
        "counter": Counter(int(value)),
        "note": ("text", value),
    }


def load(path: Path, world_size: int) -> dict[str, Any]:
    """The whole checkpoint by stock `dcp.load` in this one process."""
    wanted: dict[str, Any] = {
        "model": {"replicated": torch.zeros(5), "layers": [{"sharded": torch.zeros(7, 3)}]},
        "mine": {f"rank{rank}": torch.zeros(2) for rank in range(world_size)},
        "counter": Counter(-1),
        "note": None,
    }
    stock.load(wanted, checkpoint_id=path, no_dist=True)
    return wanted


def holds(path: Path, value: float, world_size: int) -> bool:
    found = load(path, world_size)
    return (
        torch.equal(found["model"]["replicated"], torch.full((5,), float(value)))
        and torch.equal(found["model"]["layers"][0]["sharded"], WHOLE + value)
        and all(torch.equal(found["mine"][f"rank{r}"], torch.full((2,), float(value + r))) for r in range(world_size))
        and found["counter"].value == int(value)
        and found["note"] == ("text", value)
    )


def failures_of(save: Callable[[], Any]) -> dict[int, tuple[str, str]]:
    """rank -> (type, text) of the CheckpointException that the save's future ends in."""
    error = save().exception(COMMIT_S)
    assert type(error) is CheckpointException, error
    for wrapped in error.failures.values():
        assert isinstance(wrapped, tuple)
        assert isinstance(wrapped[0], BaseException)
        assert isinstance(wrapped[1], traceback.StackSummary)
    return {rank: (type(each).__name__, str(each)) for rank, (each, _) in error.failures.items()}


@contextlib.contextmanager
def environment(**changes: str | None) -> Any:
    """Variables of this process, for a while; None is unset."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.mark.parametrize("pods", [ONE_POD, TWO_PODS], ids=["one pod", "two pods"])
def test_a_save_by_our_own_writer_is_loaded_by_stock_dcp(
    ranks: Ranks, tmp_path: Path, pods: tuple[str, ...] | None
) -> None:
    """A path, a FileSystemWriter, either checkpointer type, no_dist and `save` give checkpoints that stock `dcp.load` and Pillion's
    read; what ranks cannot stage is every rank's failure, with exactly those ranks."""

    def body(peer: Peer) -> list[Any]:
        os.chdir(tmp_path)
        saves = [
            dcp.async_save(state(peer, 1.0), checkpoint_id="one"),
            dcp.async_save(
                state(peer, 2.0),
                storage_writer=stock.FileSystemWriter("two"),
                planner=stock.DefaultSavePlanner(),
                async_checkpointer_type=dcp.AsyncCheckpointerType.PROCESS,
                process_group=dist.group.WORLD,
            ),
            dcp.async_save(
                state(peer, 3.0), checkpoint_id=tmp_path / "three", storage_writer=stock.FileSystemWriter("unused")
            ),
            # The same directory again: overwrite is DCP's default.
            dcp.async_save(state(peer, 4.0), checkpoint_id="three"),
        ]
        told = [(each.result(COMMIT_S).path, each.result().size_bytes > 0) for each in saves]

        def refused() -> Any:
            writer = stock.FileSystemWriter("three", overwrite=False)
            return dcp.async_save(state(peer, 5.0), storage_writer=writer)

        fresh = stock.FileSystemWriter("five", overwrite=False)
        dcp.async_save(state(peer, 5.0), storage_writer=fresh).result(COMMIT_S)
        with environment(PILLION_POD=f"alone{peer.rank}"):
            mine = {"w": torch.full((2,), float(peer.rank))}
            dcp.async_save(mine, checkpoint_id=f"alone{peer.rank}", no_dist=True).result(COMMIT_S)

        def unstaged(ranks_that_fail: set[int]) -> Any:
            mine = {"w": torch.ones(2)} | ({"leaf": threading.Lock()} if peer.rank in ranks_that_fail else {})
            return dcp.async_save(mine, checkpoint_id="unstaged")

        failed = [sorted(failures_of(lambda: unstaged(which))) for which in UNSTAGED]  # noqa: B023
        loaded = []
        for name, value in (("one", 1.0), ("three", 4.0)):
            into = state(peer, 0.0)
            dcp.load(into, checkpoint_id=name)
            wanted = state(peer, value)
            local = [each["model"]["layers"][0]["sharded"].to_local() for each in (into, wanted)]
            equal = torch.equal(*local) and torch.equal(*(each["mine"][f"rank{peer.rank}"] for each in (into, wanted)))
            loaded.append(equal and into["counter"].value == int(value) and into["note"] == ("text", value))
        dcp.save(state(peer, 6.0), checkpoint_id="six")
        # Last, so that a session that ends with a save that failed leaves nothing behind either.
        failures = failures_of(refused)
        dcp.close()
        return [told, failures, failed, loaded]

    job = ranks.start(body, num_ranks=4, pods=pods, env={"OMP_NUM_THREADS": "1"})
    for told, failures, failed, loaded in job.finish(Deadline.SCRIPT):
        assert failed == [sorted(which) for which in UNSTAGED]
        assert loaded == [True, True]
        assert told == [(str(tmp_path / name), True) for name in ("one", "two", "three", "three")]
        assert failures.keys() == {0, 1, 2, 3}
        assert all(kind == "RuntimeError" and "already exists" in text for kind, text in failures.values())
    for name, value in {"one": 1.0, "two": 2.0, "three": 4.0, "five": 5.0, "six": 6.0}.items():
        assert holds(tmp_path / name, value, 4), name
    for rank in range(4):
        alone = {"w": torch.zeros(2)}
        stock.load(alone, checkpoint_id=tmp_path / f"alone{rank}", no_dist=True)
        assert torch.equal(alone["w"], torch.full((2,), float(rank)))
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("pods", [ONE_POD, TWO_PODS], ids=["one pod", "two pods"])
def test_a_writer_by_name_fails_on_exactly_the_ranks_that_failed(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pods: tuple[str, ...] | None
) -> None:
    """A fault in each hook, on chosen ranks, is every rank's CheckpointException with exactly those; the next save works."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    cases: list[tuple[str, list[int]]] = [
        *((hook, [1, 3]) for hook in writers.HOOKS if hook not in ("prepare_global_plan", "finish")),
        ("write_data", [0, 1, 2, 3]),
        ("prepare_local_plan", [2]),
        # Only the coordinator's is called, whomever the fault is meant for.
        ("prepare_global_plan", [0, 1]),
        ("finish", [0, 3]),
    ]
    log = tmp_path / "log"
    log.mkdir()

    def body(peer: Peer) -> list[Any]:
        os.chdir(tmp_path)

        def save(value: float, where: str, **arguments: Any) -> Any:
            writer = dcp.Writer("support.writers:Recorder", arguments)
            return dcp.async_save(state(peer, value), checkpoint_id=where, storage_writer=writer)

        save(0.0, "first", log=str(log)).result(COMMIT_S)
        found: list[Any] = []
        for number, (hook, failing) in enumerate(cases):
            found.append(failures_of(lambda: save(1.0, f"case{number}", faults={hook: failing})))  # noqa: B023
        for error in ("Refusal", "SystemExit", "OSError"):
            found.append(failures_of(lambda: save(1.0, error, faults={"write_data": [2]}, error=error)))  # noqa: B023
        refused = save(1.0, "refused", faults={"finish": [0]}).exception(COMMIT_S)
        error, stack = refused.failures[0]
        found.append(
            [[frame.name for frame in stack][-2:], str(error.__cause__).count("in enter"), "enter" in str(refused)]
        )
        save(2.0, "last").result(COMMIT_S)
        dcp.close()
        return found

    job = ranks.start(body, num_ranks=4, pods=pods, env={"OMP_NUM_THREADS": "1"})
    for found in job.finish(Deadline.SCRIPT):
        for (hook, failing), failures in zip(cases, found, strict=False):
            expected = [0] if hook in ("prepare_global_plan", "finish") else failing
            assert failures == {rank: ("ValueError", f"{hook} fails on {rank}") for rank in expected}, hook
        # The remote traceback: as DCP's StackSummary, as the text of the cause, and in the exception's own text.
        assert found.pop() == [["finish", "enter"], 1, True]
        assert found[len(cases) :] == [
            {2: ("RemoteError", "Refusal: write_data fails on 2")},
            {2: ("RemoteError", "SystemExit: write_data fails on 2")},
            {2: ("OSError", "[Errno 28] write_data fails on 2")},
        ]
    for rank in range(4):
        mine = [hook for hook in writers.HOOKS if rank == 0 or hook not in ("prepare_global_plan", "finish")]
        assert writers.hooks_of(log, rank) == mine
    assert holds(tmp_path / "first", 0.0, 4)
    assert holds(tmp_path / "last", 2.0, 4)
    assert not list(tmp_path.glob("case*/.metadata"))


@pytest.mark.parametrize("pods", [ONE_POD, TWO_PODS], ids=["one pod", "two pods"])
def test_a_writer_of_its_own_format_that_takes_no_keyword_arguments_plugs_in(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pods: tuple[str, ...] | None
) -> None:
    """An older writer's objects reach its other instances, as they are in a pod and as documents between pods."""
    monkeypatch.setenv("PYTHONPATH", TESTS)

    def body(peer: Peer) -> list[Any]:
        os.chdir(tmp_path)

        def save(name: str, where: str) -> Any:
            writer = dcp.Writer(f"support.writers:{name}", {})
            return dcp.async_save(state(peer, 1.0), checkpoint_id=where, storage_writer=writer)

        save("Bare", "bare").result(COMMIT_S)
        save("Untyped", "untyped").result(COMMIT_S)
        disagreeing = {"w": torch.zeros(2 + peer.rank // 2)}
        writer = dcp.Writer("support.writers:Bare")
        disagree = [
            failures_of(lambda: dcp.async_save(disagreeing, checkpoint_id="disagree", storage_writer=which))  # noqa: B023
            for which in (None, writer)
        ]
        missing = failures_of(lambda: save("NoSuchWriter", "missing"))
        unsendable = save("Unsendable", "unsendable").exception(COMMIT_S)
        hanging = failures_of(lambda: save("Hanging", "hanging"))
        save("Bare", "again").result(COMMIT_S)
        dcp.close()
        told = None
        if unsendable is not None:
            told = {rank: str(error) for rank, (error, _) in unsendable.failures.items()}
        return [disagree, missing, told, hanging]

    env = {"OMP_NUM_THREADS": "1", "PILLION_PERSIST_TIMEOUT_S": "3"}
    for disagree, missing, unsendable, hanging in ranks.start(body, num_ranks=4, pods=pods, env=env).finish():
        assert disagree[0] == disagree[1]
        assert disagree[0].keys() == {0, 2}, "the first rank of each opinion"
        assert all("'w' is float32[2] on rank 0 and float32[3] on rank 2" in text for _, text in disagree[0].values())
        assert missing.keys() == {0, 1, 2, 3}
        assert {kind for kind, _ in missing.values()} == {"AttributeError"}
        # Within a pod objects are passed as they are; the coordinator's own never leave its pod.
        assert (unsendable or {}).keys() == (set() if pods is None else {2, 3})
        assert all("support.writers:Unsendable hands on a _thread.lock" in text for text in (unsendable or {}).values())
        assert hanging == {1: ("TimeoutError", "support.writers:Hanging did not return within 3.0 s")}
    for name in ("bare", "again"):
        assert (tmp_path / name / "index.json").exists()
        assert not (tmp_path / name / ".metadata").exists()
    results = json.loads((tmp_path / "untyped" / "results.json").read_text())
    assert results == [[{"success": True, "rank": rank}] for rank in range(4)]
    parts = [torch.load(tmp_path / "bare" / f"{rank}.pt") for rank in range(4)]
    assert torch.equal(torch.cat([part["model.layers.0.sharded"] for part in parts]), WHOLE + 1.0)
    assert sum("model.replicated" in part for part in parts) == 1


@pytest.mark.parametrize("broken", [{"MASTER_ADDR": None}, {"MASTER_PORT": "70000"}], ids=["missing", "malformed"])
def test_prefix_mode_without_the_stores_address_fails_on_every_rank(
    ranks: Ranks, tmp_path: Path, broken: dict[str, str | None]
) -> None:
    """Under DCP_USE_PREFIX_STORE=1 a bad MASTER_ADDR or MASTER_PORT is every rank's CheckpointException; mended, it works."""

    def body(peer: Peer) -> dict[int, tuple[str, str]]:
        os.chdir(tmp_path)
        with environment(DCP_USE_PREFIX_STORE="1", **broken):
            failures = failures_of(lambda: dcp.async_save(state(peer, 1.0), checkpoint_id="one"))
        with environment(DCP_USE_PREFIX_STORE="1"):
            dcp.async_save(state(peer, 1.0), checkpoint_id="one").result(COMMIT_S)
        dcp.close()
        return failures

    for failures in ranks.start(body, num_ranks=2, pods=("a", "b")).finish():
        assert failures.keys() == {0, 1}
        name = next(iter(broken))
        assert all(kind == "RemoteError" and name in text for kind, text in failures.values())
    assert holds(tmp_path / "one", 1.0, 2)


def test_what_cannot_be_had_is_a_usage_error_that_says_what_to_do(tmp_path: Path) -> None:
    """Options that the sidecar cannot honour are refused at the call, before anything is started, with the way out."""
    writer = stock.FileSystemWriter(tmp_path)
    unusual: list[tuple[dict[str, Any], str]] = [
        ({}, "checkpoint_id must be given"),
        ({"checkpoint_id": "gcs://bucket/x"}, "pillion.dcp.Writer"),
        ({"storage_writer": writers.Recorder(str(tmp_path))}, r'pillion.dcp.Writer\("support.writers:Recorder"'),
        (
            {"storage_writer": stock.FileSystemWriter(tmp_path, serialization_format=stock.filesystem.SerializationFormat.SAFETENSORS)},
            "SAFETENSORS",
        ),
        ({"storage_writer": writer, "planner": stock.DefaultSavePlanner(flatten_state_dict=False)}, "leave the planner out"),
        ({"storage_writer": writer, "async_stager": object()}, "AsyncStager"),
        ({"storage_writer": writer, "use_collectives": False}, "leave it out"),
        ({"storage_writer": writer, "async_checkpointer_type": "thread"}, "AsyncCheckpointerType"),
    ]  # fmt: skip
    for options, told in unusual:
        with pytest.raises(pillion.UsageError, match=told):
            dcp.async_save({"w": torch.ones(1)}, **options)
    for name, arguments in (("no colon", {}), ("a:B", {"x": object()}), ("a:B", {"x": float("nan")})):
        with pytest.raises(pillion.UsageError, match="Writer"):
            dcp.Writer(name, arguments)
