"""
The whole of: a run that begins from another run's checkpoint: which one, under which names, and that both runs go on as if alone.

Called from: pytest.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as stock

import pillion
from pillion import checkpointer
from pillion.wire import names
from pillion.wire.load_messages import Tier
from process.injected import Injected
from process.ranks import Peer, Ranks, committed
from support.deadlines import Deadline
from support.processes import Processes

POLICY: dict[str, Any] = {"staging": {"slots": 3}, "trigger": {"periodSteps": 100, "onTermination": "Skip"}}


def state_of(step: int, top: str = "model") -> dict[str, Any]:
    return {top: {"w": torch.full((300,), float(step)), "b": torch.full((7,), step)}, "note": f"step {step}"}


def train(root: Path, *steps: int) -> None:
    with checkpointer.Checkpointer(root, policy=POLICY) as opened:
        for step in steps:
            opened.save(state_of(step), step).result(Deadline.COMMITTED.s)


def files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


def test_a_run_begins_from_the_newest_a_numbered_and_a_named_checkpoint_of_another_run(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Its root, its root and a step, and the directory of a step, Pillion's or stock DCP's. Not a byte there changes."""
    train(tmp_path / "before", 10, 20, 30)
    ranks.alone()
    stock.save(state_of(5), checkpoint_id=str(tmp_path / "stock"))
    (tmp_path / "before" / "step-40").mkdir()
    (tmp_path / "before" / "step-40" / "part-0.9.json").write_text("{}")
    before = files(tmp_path)
    opened = ranks.open(tmp_path / "tuning", **POLICY)
    assert opened.find(path=tmp_path / "before") == pillion.Found(
        step=30, tier=Tier.STORAGE, path=str(tmp_path / "before" / "step-30")
    )
    assert opened.find(path=tmp_path / "nowhere") is None
    assert opened.find(11, path=tmp_path / "before") is None
    for call, step in (
        ({"path": tmp_path / "before"}, 30),
        ({"path": str(tmp_path / "before"), "step": 10}, 10),
        ({"path": tmp_path / "before" / "step-20"}, 20),
    ):
        state = state_of(0)
        assert opened.load(state, **call) == step
        assert torch.equal(state["model"]["b"], torch.full((7,), step))
        assert state["note"] == f"step {step}"
        assert opened.last_load is not None
        assert opened.last_load.path == str(tmp_path / "before" / f"step-{step}")
    state = state_of(0)
    assert opened.load(state, path=tmp_path / "stock") == 0, "stock DCP says no step"
    assert state["note"] == "step 5"
    assert files(tmp_path).items() >= before.items()
    assert set(files(tmp_path / "before")) == {name for name in before if "/before/" in name}


def test_the_run_goes_on_at_its_own_step_and_a_restart_takes_its_own_checkpoint(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A restarted script that loads from elsewhere again is told what it passes over: it would begin again from there, every time."""
    train(tmp_path / "before", 100)
    ranks.alone()

    def tune(_: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path / "tuning", policy=POLICY) as opened:
            state = state_of(0)
            assert opened.load(state) is None
            assert opened.load(state, path=tmp_path / "before") == 100
            for step in (1, 2):
                opened.save(state_of(step), step).result(Deadline.COMMITTED.s)

    ranks.start(tune).finish()
    ranks.alone()
    assert committed(tmp_path / "tuning") == [1, 2]
    opened = ranks.open(tmp_path / "tuning", **POLICY)
    state = state_of(0)
    with caplog.at_level(logging.WARNING):
        assert opened.load(state, path=tmp_path / "before") == 100
    assert "this run has checkpoints of its own, the newest step is 2" in caplog.text
    assert opened.last_load is not None
    assert opened.last_load.set_aside == (1, 2)
    assert opened.load(state) == 2
    assert state["note"] == "step 2"
    opened.save(state, 3).result(Deadline.COMMITTED.s)


def test_values_come_under_other_names_and_what_does_not_match_is_named_under_both(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From storage, and from memory for a run's own checkpoint; two values may take one."""
    train(tmp_path / "before", 3)
    ranks.alone()
    opened = ranks.open(tmp_path / "tuning", **POLICY)
    state: dict[str, Any] = {
        **state_of(0, "net"),
        "ema": {"w": torch.zeros(300), "b": torch.zeros(7, dtype=torch.int16)},
    }
    rename = {"net": "model", "ema": "model"}
    assert opened.load(state, path=tmp_path / "before", rename=rename) == 3
    assert torch.equal(state["net"]["w"], torch.full((300,), 3.0))
    assert torch.equal(state["ema"]["w"], torch.full((300,), 3.0))
    assert torch.equal(state["ema"]["b"], torch.full((7,), 3).short())
    assert opened.last_load is not None
    assert opened.last_load.narrowed == {"ema.b": "int64 -> int16"}
    opened.save(state_of(8), 8, persist=False).result(Deadline.COMMITTED.s)
    assert opened.load(state, rename=lambda fqn: fqn.replace("net.", "model.").replace("ema.", "model.")) == 8
    assert opened.last_load.tier == "arena"
    assert torch.equal(state["ema"]["w"], torch.full((300,), 8.0))
    head = {"net": {"w": torch.zeros(300), "head": torch.full((2,), 7.0)}}
    with pytest.raises(
        pillion.IncompatibleCheckpoint, match=r"'model\.head' is not in it.*asks for 'net\.head' as 'model\.head'"
    ) as raised:
        opened.load(head, path=tmp_path / "before", rename={"net": "model"})
    assert raised.value.fqns == ("net.head",)
    with caplog.at_level(logging.WARNING):
        assert opened.load(head, path=tmp_path / "before", rename={"net": "model"}, strict=False) == 3
    assert opened.last_load.missing == ("net.head",)
    assert opened.last_load.unexpected == ("model.b", "note")
    assert "left unchanged: net.head" in caplog.text
    assert torch.equal(head["net"]["head"], torch.full((2,), 7.0))


def test_two_ranks_begin_from_a_run_of_one_and_one_from_a_run_of_two(ranks: Ranks, tmp_path: Path) -> None:
    """Another world size is no matter; each rank of two has its own value as well."""

    def tune(peer: Peer) -> str:
        with checkpointer.Checkpointer(tmp_path / "two", policy=POLICY) as opened:
            state = state_of(0, f"net{peer.rank}")
            assert opened.load(state, path=tmp_path / "one", rename={f"net{peer.rank}": "model"}) == 4
            opened.save(state, 1).result(Deadline.COMMITTED.s)
            return str(state["note"])

    train(tmp_path / "one", 4)
    ranks.alone()
    assert ranks.start(tune, num_ranks=2).finish(Deadline.LOADED) == ["step 4"] * 2
    ranks.alone()
    opened = ranks.open(tmp_path / "three", **POLICY)
    state = state_of(0)
    assert opened.load(state, path=tmp_path / "two", rename={"model": "net1"}) == 1
    assert torch.equal(state["model"]["w"], torch.full((300,), 4.0))


def test_a_corrupt_checkpoint_of_another_run_is_named_and_the_one_before_it_is_taken(
    ranks: Ranks, tmp_path: Path
) -> None:
    """One that is asked for by its number or its directory is an error."""
    train(tmp_path / "before", 1, 2)
    ranks.alone()
    (data,) = (tmp_path / "before" / "step-2").glob("__0_*")
    data.write_bytes(data.read_bytes()[:-4096])
    opened = ranks.open(tmp_path / "tuning", **POLICY)
    state = state_of(0)
    assert opened.load(state, path=tmp_path / "before") == 1
    assert opened.last_load is not None
    assert list(opened.last_load.refused) == ["storage:2"]
    with pytest.raises(pillion.CorruptCheckpoint, match=r"step-2|storage:2"):
        opened.load(state, 2, path=tmp_path / "before")
    with pytest.raises(pillion.CorruptCheckpoint, match="step-2"):
        opened.load(state, path=tmp_path / "before" / "step-2")


def test_what_cannot_be_meant_is_refused_with_what_is_allowed(ranks: Ranks, tmp_path: Path) -> None:
    """A directory without a checkpoint, a step of one that has it, a step within a step, an address of nothing."""
    train(tmp_path / "before", 1)
    ranks.alone()
    opened = ranks.open(tmp_path / "tuning", **POLICY)
    for call, error, text in (
        (
            {"path": tmp_path},
            pillion.NoCheckpoint,
            r"neither does it have a \.metadata itself, nor has a directory step-N",
        ),
        ({"path": tmp_path / "no"}, pillion.NoCheckpoint, "there is no checkpoint in"),
        ({"path": tmp_path / "before", "step": 2}, pillion.NoCheckpoint, r"no checkpoint of step 2.*\[1\]"),
        ({"path": tmp_path / "before/step-1", "step": 1}, pillion.UsageError, "is one checkpoint.*leave step out"),
        ({"path": "https://host/run"}, pillion.UsageError, "by a URL with s3://"),
        ({"path": ""}, pillion.UsageError, "path is empty"),
    ):
        with pytest.raises(error, match=text):
            opened.load(state_of(0), **call)


def test_in_a_pod_the_sidecar_reads_what_is_below_the_jobs_directory_and_refuses_the_rest(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """The trainer chooses no directory of another job: the sidecar may read more than the trainer."""
    train(tmp_path / "other", 3)
    ranks.alone()
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run")

    def tune(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer() as opened:
            opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)
            state = state_of(0)
            told: list[Any] = [opened.load(state, path=tmp_path / "run" / "step-1"), state["note"]]
            told.append(opened.load(state, path=tmp_path / "run"))
            for path in (
                tmp_path / "other",
                tmp_path,
                tmp_path / "run" / ".." / "other",
                tmp_path / "run" / ".pillion",
            ):
                for call in (lambda path=path: opened.load(state, path=path), lambda path=path: opened.read(path=path)):
                    try:
                        told.append(call())
                    except pillion.UsageError as err:
                        told.append(str(err))
            return told

    [(step, note, again, *refused)] = ranks.start(tune, env=sidecar.trainer).finish()
    assert (step, note, again) == (1, "step 1", 1)
    assert len(refused) == 8
    assert all(f"is not below {tmp_path}/run" in text and names.ENV_ROOT in text for text in refused)


def test_a_job_without_a_checkpoint_begins_from_the_one_that_its_policy_names_and_later_from_its_own(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """In a pod: load() alone does it, and goes on at that step; load(path=...) may read that job's directory as well, and no third one."""
    for job in ("before", "third"):
        train(tmp_path / job, 50, 100)
        ranks.alone()
    policy = {"restore": {"from": {"job": "before"}}, "trigger": {"periodSteps": 1}}
    before = files(tmp_path / "before")

    def tune(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer() as opened:
            state = state_of(0)
            found = opened.find()
            told: list[Any] = [found and found.path, opened.load(state), state["note"]]
            try:
                opened.save(state_of(7), 7).result(Deadline.COMMITTED.s)
            except pillion.UsageError as err:
                told.append("older than step" in str(err))
            opened.save(state_of(101), 101).result(Deadline.COMMITTED.s)
            told += [opened.load(state, path=tmp_path / "before", step=50), state["note"]]
            try:
                opened.load(state, path=tmp_path / "third")
            except pillion.UsageError as err:
                told.append(str(err))
            return told

    def again(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer() as opened:
            found = opened.find()
            return [found and found.step, opened.load(state_of(0))]

    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", policy=policy)
    [told] = ranks.start(tune, env=sidecar.trainer).finish()
    *told, refused = told
    assert told == [str(tmp_path / "before" / "step-100"), 100, "step 100", True, 50, "step 50"]
    assert f"or from {tmp_path}/before, as the policy's restore.from says" in refused
    assert files(tmp_path / "before") == before
    assert not (tmp_path / "run" / names.INTERNAL_DIR / "verified.json").exists(), "nothing of its own was verified"
    assert ranks.start(again, env=sidecar.trainer).finish() == [[101, 101]]


def test_a_job_that_the_policy_names_and_that_has_no_checkpoint_is_never_a_fresh_start(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Nor is one without the step; a corrupt newest one is passed over as anywhere else."""
    train(tmp_path / "before", 1, 2)
    ranks.alone()
    opened = ranks.open(tmp_path / "run", **POLICY, restore={"from": {"job": "nobody"}})
    with pytest.raises(pillion.NoCheckpoint, match=r"names the job 'nobody': there is no checkpoint in .*/nobody"):
        opened.load(state_of(0))
    opened.close()
    ranks.alone()
    opened = ranks.open(tmp_path / "run", **POLICY, restore={"from": {"job": "before", "step": 3}})
    with pytest.raises(pillion.NoCheckpoint, match=r"'before': there is no checkpoint of step 3"):
        opened.load(state_of(0))
    opened.close()
    ranks.alone()
    (data,) = (tmp_path / "before" / "step-2").glob("__0_*")
    data.write_bytes(data.read_bytes()[:-4096])
    opened = ranks.open(tmp_path / "run", **POLICY, restore={"from": {"job": "before"}})
    assert opened.load(state_of(0)) == 1
    assert opened.last_load is not None
    assert list(opened.last_load.refused) == ["storage:2"]
