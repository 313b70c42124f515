"""
The whole of: a training of one pod whose root is a bucket: what it saves there is all that its successor has, and what other programs read.

Called from: pytest.
"""

import os
import signal
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.distributed import checkpoint as stock

import pillion
from pillion import checkpointer, dcp
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from process import ranks as processes_of
from process.ranks import Peer, Ranks
from support import deadlines
from support.deadlines import Deadline
from support.object_stores import behind
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.faults import Fault
from support.object_stores.operations import Only, Operation
from support.object_stores.places import Place
from support.object_stores.stock_load import StockReader
from support.processes import Processes

FOLDER: Final = "team/run-1"
NUM_LARGE: Final = 3
LARGE: Final = 1_500_000
"""Elements of 4 bytes: two of them do not fit into an object of 8 MiB."""


def policy(place: Place, **more: Any) -> dict[str, Any]:
    """Objects as small as a policy allows, so that a rank has several."""
    return {"storage": {"objectStore": {"endpoint": place.endpoint, "objectSize": "8Mi"}}, **more}


def state_of(step: int) -> dict[str, Any]:
    large = {f"layer{number}": torch.arange(LARGE, dtype=torch.float32) + step + number for number in range(NUM_LARGE)}
    return large | {"small": {"exp_avg": torch.full((7,), float(step))}, "note": ["text", step], "step": step}


def holds(state: dict[str, Any], step: int) -> bool:
    wanted = state_of(step)
    return (
        all(torch.equal(state[name], wanted[name]) for name in wanted if name.startswith("layer"))
        and torch.equal(state["small"]["exp_avg"], wanted["small"]["exp_avg"])
        and (state["note"], state["step"]) == (wanted["note"], step)
    )


def test_what_is_only_in_the_bucket_is_found_loaded_rolled_back_and_saved_again(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has several objects; retention keeps two steps; no directory of the URL's name is made; nothing is left unended."""
    place = s3_proxy.place
    monkeypatch.chdir(tmp_path)
    url, keep = f"{place.url}/{FOLDER}", {"retention": {"keepLast": 2}}

    def first(_: Peer) -> list[str]:
        with checkpointer.Checkpointer(url, policy=policy(place, **keep)) as opened:
            assert opened.load(state_of(0)) is None
            for step in (1, 2, 3):
                opened.save(state_of(step), step).result(Deadline.COMMITTED.s)
            latest = opened.latest()
            assert latest is not None
            return [str(latest.step), str(latest.path)]

    def second(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer(url, policy=policy(place, **keep)) as opened:
            found = opened.find()
            state = state_of(0)
            told: list[Any] = [found and found.step, opened.load(state), holds(state, 3)]
            assert opened.last_load is not None
            told += [str(opened.last_load.tier), opened.find(1)]
            told += [opened.load(state, step=2), holds(state, 2)]
            opened.save(state_of(103) | {"step": 3}, 3).result(Deadline.COMMITTED.s)
            return told

    def third(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer(url, policy=policy(place, **keep)) as opened:
            state = state_of(0)
            step = opened.load(state)
            return [step, torch.equal(state["layer1"], state_of(103)["layer1"])]

    assert ranks.start(first, env=place.environment).finish() == [["3", f"{url}/step-3"]]
    ranks.alone()
    deadlines.eventually(lambda: behind.committed(place, FOLDER) == [2, 3], Deadline.COMMITTED, "step 1 is removed")
    assert len([name for name in behind.files(place, FOLDER) if name.startswith("step-3/__0_")]) == NUM_LARGE
    told = ranks.start(second, env=place.environment).finish()
    assert told == [[3, 3, True, "storage", None, 2, True]]
    ranks.alone()
    assert ranks.start(third, env=place.environment).finish() == [[3, True]]
    ranks.alone()
    assert list(tmp_path.iterdir()) == []
    assert ".pillion/sidecar-0.log" in behind.files(place, FOLDER)
    assert not s3_proxy.seen(Only(operation=Operation.BEGIN_PARTS))
    assert behind.unended_uploads(place) == []


def test_a_run_begins_from_another_runs_prefix_and_reads_it_without_a_state_dict(
    ranks: Ranks, s3_bucket: Place
) -> None:
    """From the newest or a numbered checkpoint of the prefix, and from one by its own URL."""
    url = f"{s3_bucket.url}/{FOLDER}"

    def before(_: Peer) -> None:
        with checkpointer.Checkpointer(url, policy=policy(s3_bucket)) as opened:
            for step in (1, 2):
                opened.save(state_of(step), step).result(Deadline.COMMITTED.s)

    def tune(_: Peer) -> list[Any]:
        with checkpointer.Checkpointer(f"{s3_bucket.url}/tuning", policy=policy(s3_bucket)) as opened:
            state = state_of(0)
            told: list[Any] = [opened.load(state, path=url), holds(state, 2), holds(opened.read(1, path=url), 1)]
            found = opened.find(path=f"{url}/step-1/")
            told += [found and found.path == f"{url}/step-1", opened.read(path=f"{url}/step-2", prefix="note")]
            try:
                opened.read(path=f"{s3_bucket.url}/nobody")
            except pillion.NoCheckpoint as err:
                told.append(f"{s3_bucket.url}/nobody" in str(err))
            return told

    ranks.start(before, env=s3_bucket.environment).finish()
    ranks.alone()
    told = ranks.start(tune, env=s3_bucket.environment).finish()
    assert told == [[2, True, True, True, {"note": ["text", 2]}, True]]


def test_an_upload_that_nobody_ended_is_seen(s3_bucket: Place) -> None:
    """What the other tests look for in vain is found where it is."""
    assert behind.unended_uploads(s3_bucket) == []
    behind.begin_upload(s3_bucket, "a/b")
    assert behind.unended_uploads(s3_bucket) == ["a/b"]


def test_a_second_training_on_a_bucket_is_refused_with_both_names(
    ranks: Ranks, s3_bucket: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a directory; the first one saves on, and when it has ended the second is let in."""
    monkeypatch.setenv("PILLION_OWNER_SILENT_S", "1")
    url = f"{s3_bucket.url}/{FOLDER}"

    def train(peer: Peer) -> None:
        with checkpointer.Checkpointer(url, policy=policy(s3_bucket)) as opened:
            while (step := peer.hear()) is not None:
                peer.tell(opened.save({"w": torch.ones(9)}, step).result(Deadline.COMMITTED.s).step)

    def come(_: Peer) -> tuple[str, int | None]:
        try:
            with checkpointer.Checkpointer(url, policy=policy(s3_bucket)) as opened:
                return "", opened.load({"w": torch.zeros(9)})
        except pillion.UsageError as err:
            return str(err), None

    first = ranks.start(train, pods="a", env=s3_bucket.environment)[0]
    first.say(1)
    assert first.hear() == 1
    [(said, _)] = ranks.start(come, pods="b", env=s3_bucket.environment).finish()
    assert "which lives" in said
    assert said.count("sidecar's pid") == 2
    assert url in said
    first.say(2)
    assert first.hear() == 2
    first.say(None)
    first.wait()
    assert ranks.start(come, pods="b", env=s3_bucket.environment).finish() == [("", 2)]


def test_calls_of_dcp_save_to_a_bucket_and_load_from_it(ranks: Ranks, s3_bucket: Place) -> None:
    """`save`, `async_save` and `load` with a URL as checkpoint_id go through the sidecar; what is not there is named."""
    url = f"{s3_bucket.url}/{FOLDER}"

    def body(_: Peer) -> dict[str, Any]:
        saved = dcp.save(state_of(1), checkpoint_id=f"{url}/one")
        assert isinstance(saved, pillion.Checkpoint)
        found: dict[str, Any] = {"path": saved.path}
        future = dcp.async_save(state_of(2), checkpoint_id=f"{url}/two/")
        assert not isinstance(future, dcp.AsyncSaveResponse)
        found["async"] = future.result(Deadline.COMMITTED.s).path
        for name, step in (("one", 1), ("two", 2)):
            state = state_of(0)
            dcp.load(state, checkpoint_id=f"{url}/{name}")
            found[name] = holds(state, step)
        with pytest.raises(dcp.CheckpointException) as raised:
            dcp.load(state_of(0), checkpoint_id=f"{url}/nothing")
        found["nothing"] = [f"{type(error).__name__}: {error}" for error, _ in raised.value.failures.values()]
        dcp.close()
        return found

    environment = {"AWS_ENDPOINT_URL": s3_bucket.endpoint, **s3_bucket.environment}
    [found] = ranks.start(body, env=environment).finish()
    [nothing] = found.pop("nothing")
    assert found == {"path": f"{url}/one", "async": f"{url}/two", "one": True, "two": True}
    assert nothing.startswith("NoCheckpoint")
    assert f"{url}/nothing" in nothing


def test_stock_torch_reads_from_the_bucket_what_was_saved(
    stock_reader: StockReader, ranks: Ranks, processes: Processes, s3_bucket: Place, tmp_path: Path
) -> None:
    """A process without Pillion loads every value, bit for bit."""
    url = f"{s3_bucket.url}/{FOLDER}"

    def train(_: Peer) -> None:
        with checkpointer.Checkpointer(url, policy=policy(s3_bucket)) as opened:
            opened.save(state_of(5), 5).result(Deadline.COMMITTED.s)

    ranks.start(train, env=s3_bucket.environment).finish()
    out = tmp_path / "state.pt"
    stock_reader.start(processes, s3_bucket, f"{FOLDER}/step-5", out).check(Deadline.SCRIPT)
    found = torch.load(out, weights_only=False)
    wanted = state_of(5)
    for name in (name for name in wanted if name.startswith("layer")):
        assert torch.equal(found[name], wanted[name])
    assert torch.equal(found["small.exp_avg"], wanted["small"]["exp_avg"])
    assert found["step"] == 5


@pytest.mark.parametrize("wrong", ["bucket", "secret", "condition"])
def test_a_bucket_that_cannot_hold_checkpoints_is_an_error_of_the_constructor(
    ranks: Ranks, s3_proxy: FaultProxy, wrong: str
) -> None:
    """A bucket that is not there, a wrong credential, and a store that ignores If-None-Match; the text has the URL and what to do."""
    place = s3_proxy.place
    url = f"{place.url}-of-nobody/{FOLDER}" if wrong == "bucket" else f"{place.url}/{FOLDER}"
    environment = place.environment | ({"AWS_SECRET_ACCESS_KEY": "another"} if wrong == "secret" else {})
    if wrong == "condition":
        s3_proxy.arm(Fault.UNCONDITIONAL, times=None)

    def begin(_: Peer) -> str:
        try:
            checkpointer.Checkpointer(url, policy=policy(place))
        except pillion.SettingsError as err:
            return str(err)
        return "no error"

    [said] = ranks.start(begin, env=environment).finish()
    assert url in said
    assert {"bucket": "make it first", "secret": "AWS_ACCESS_KEY_ID", "condition": "If-None-Match"}[wrong] in said
    assert behind.files(place, FOLDER) == {}


def test_an_executor_that_is_killed_in_mid_upload_has_a_successor_that_sends_what_is_not_there(
    ranks: Ranks, s3_proxy: FaultProxy
) -> None:
    """What was whole in the bucket is not sent again."""
    place = s3_proxy.place

    def train(peer: Peer) -> int:
        with checkpointer.Checkpointer(f"{place.url}/{FOLDER}", policy=policy(place)) as opened:
            handle = opened.save(state_of(1), 1)
            peer.tell()
            return handle.result(Deadline.COMMITTED.s).step

    data = r"/step-1/__0_\d+\..*\.distcp$"
    held = s3_proxy.arm(Fault.STALL_UPLOAD, Only(operation=Operation.PUT, key=r"/step-1/__0_1\."), times=None)
    job = ranks.start(train, env=place.environment)
    job.hear(Deadline.STAGED)
    deadlines.eventually(
        lambda: (
            held.struck
            and len([name for name in behind.files(place, FOLDER) if name.endswith(".distcp")]) == NUM_LARGE - 1
        ),
        Deadline.COMMITTED,
        "all but one are there",
    )
    s3_proxy.forget()
    os.kill(ranks.executor(), signal.SIGKILL)
    s3_proxy.disarm()
    s3_proxy.release()
    assert job.finish() == [1]
    sent = [each.key.rpartition("/")[2] for each in s3_proxy.seen(Only(operation=Operation.PUT, key=data))]
    assert len(sent) == 1
    assert sent[0].startswith("__0_1.")
    assert behind.unended_uploads(place) == []


def test_what_was_sent_before_a_refusal_is_not_sent_again(ranks: Ranks, s3_proxy: FaultProxy) -> None:
    """The save is tried again a second later, and sends the one object that the store refused."""
    place = s3_proxy.place

    def train(_: Peer) -> int:
        with checkpointer.Checkpointer(f"{place.url}/{FOLDER}", policy=policy(place)) as opened:
            return opened.save(state_of(1), 1).result(Deadline.COMMITTED.s).step

    refused = s3_proxy.arm(Fault.NO_BUCKET, Only(operation=Operation.PUT, key=r"/step-1/__0_1\."))
    assert ranks.start(train, env=place.environment).finish() == [1]
    assert len(refused.struck) == 1
    data = Only(operation=Operation.PUT, key=r"/step-1/__0_\d+\..*\.distcp$")
    sent = sorted(each.key.rpartition("/")[2].partition(".")[0] for each in s3_proxy.seen(data))
    assert sent == ["__0_0", "__0_1", "__0_1", "__0_2"]


def test_an_attempt_that_was_stopped_between_its_two_puts_does_not_commit_over_its_successor(
    ranks: Ranks, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes up when another one owns the root and has committed the same step: its save fails, and the bucket has the successor's."""
    place, folder = s3_proxy.place, tmp_path / "faults"
    folder.mkdir()
    # In a bucket nine times as long.
    monkeypatch.setenv("PILLION_OWNER_SILENT_S", "0.2")
    url = f"{place.url}/{FOLDER}"
    hold = faults.fail_at(phase=FaultPoint.PUBLISH, fault=faults.Kind.HOLD, step=2)

    def older(peer: Peer) -> tuple[str, str]:
        with checkpointer.Checkpointer(url, policy=policy(place)) as opened:
            opened.save({"w": torch.full((9,), 1.0)}, 1).result(Deadline.COMMITTED.s)
            handle = opened.save({"w": torch.full((9,), 2.0)}, 2)
            peer.tell()
            return str(handle.committed.exception(Deadline.COMMITTED.s)), opened._session.runtime_dir

    def newer(_: Peer) -> int | None:
        with checkpointer.Checkpointer(url, policy=policy(place)) as opened:
            step = opened.load({"w": torch.zeros(9)})
            opened.save({"w": torch.full((9,), 200.0)}, 2).result(Deadline.COMMITTED.s)
            return step

    first = ranks.start(older, pods="a", env={**place.environment, **faults.to_environment(folder, [hold])})
    first.hear(Deadline.STAGED)
    deadlines.eventually(lambda: faults.hits(folder), Deadline.COMMITTED, "it is between its two puts")
    stopped = [ranks.executor(), ranks.sidecar()]
    for pid in stopped:
        processes_of.stop(pid)
    # The first put and all parts are there: whoever lists the root next commits the step, as after a crash.
    assert ranks.start(newer, pods="b", env=place.environment).finish() == [2]
    for pid in stopped:
        processes_of.go_on(pid)
    faults.release(folder)
    [(said, runtime_dir)] = first.finish()
    ranks.keeps(runtime_dir)
    assert "fenced off" in said, said
    state = {"w": torch.zeros(9)}
    stock.load(state, checkpoint_id=behind.download(place, f"{FOLDER}/step-2", tmp_path / "step-2"), no_dist=True)
    assert torch.equal(state["w"], torch.full((9,), 200.0))
