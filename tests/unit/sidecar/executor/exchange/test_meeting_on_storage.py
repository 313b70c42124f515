"""
The whole of: the pods of a job meeting on storage, and what they agree on there.

Called from: pytest.
"""

import threading
import time
import types
from pathlib import Path
from typing import Any, cast

import pytest

from pillion.errors import BarrierTimeout, SidecarError
from pillion_sidecar.executor.agreements import Agreements
from pillion_sidecar.executor.exchange import protocol, storage
from pillion_sidecar.executor.exchange import watchdog as watchdog_module
from pillion_sidecar.executor.exchange.storage import StorageExchange
from pillion_sidecar.executor.exchange.watchdog import Watchdog, WatchedExchange
from pillion_sidecar.executor.load import choose
from pillion_sidecar.executor.save import rescue
from pillion_sidecar.executor.session import Context, with_failover
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.waits import Wait, WaitKind
from support.deadlines import Deadline

SESSION = "a" * 32
PODS = ((0, 1), (2, 3))


def pod(root: Path, first_rank: int) -> StorageExchange:
    return StorageExchange(LocalFolder(str(root)), SESSION, PODS, first_rank)


def test_pods_collect_decide_and_receive_over_files(tmp_path: Path) -> None:
    """As over a store; whoever comes later finds what was said before."""
    first, second = pod(tmp_path, 0), pod(tmp_path, 2)
    second.post("save/0/5/plan", {"from": 2})
    first.post("save/0/5/plan", {"from": 0})
    assert first.collect("save/0/5/plan", Deadline.REPLY.s) == {0: {"from": 0}, 2: {"from": 2}}
    waiting = threading.Timer(0.05, first.publish, ("save/0/5/plan", {"decided": True}))
    waiting.start()
    assert second.receive("save/0/5/plan", Deadline.REPLY.s) == {"decided": True}
    waiting.join()
    first.forget(["save/0/5/plan"])
    assert [path.name for path in (tmp_path / ".pillion" / "meetings" / SESSION).iterdir()] == [storage.OPEN]


def test_who_does_not_come_is_named_at_the_bound(tmp_path: Path) -> None:
    """All ranks of its pod."""
    first = pod(tmp_path, 0)
    first.post("plan", {})
    with pytest.raises(BarrierTimeout) as caught:
        first.collect("plan", 0.05)
    assert list(caught.value.missing) == [2, 3]


def test_a_pod_of_a_session_that_is_over_is_told_so(tmp_path: Path) -> None:
    """The coordinator of the next session removes what earlier ones met in."""
    left = pod(tmp_path, 2)
    storage.forget_sessions(LocalFolder(str(tmp_path)), but="b" * 32)
    assert not storage.is_used(LocalFolder(str(tmp_path)), SESSION)
    with pytest.raises(SidecarError, match="another session has begun"):
        left.post("plan", {})
    with pytest.raises(SidecarError, match="another session has begun"):
        left.receive("plan", Deadline.REPLY.s)


@pytest.mark.parametrize(
    ("held", "other", "persisted", "chosen"),
    [
        ([10, 12], [10, 12], [10], 12),
        ([10, 12], [8, 10], [], 10),
        ([10, 12], [8, 10], [10], None),
        ([12, 14], [8, 10], [], None),
        ([40, 12], [40, 12], [], 12),
        ([], [], [], None),
    ],
    ids=["the newest", "what both hold", "that is on storage", "nothing in common", "newer is not larger", "nothing"],
)
def test_a_rescue_takes_the_newest_snapshot_that_every_pod_holds(
    held: list[int], other: list[int], persisted: list[int], chosen: int | None
) -> None:
    """In the order in which the coordinator made them; what is committed already needs no rescue."""
    offers = {0: {"held": held, "persisted": []}, 2: {"held": other, "persisted": persisted}}
    assert rescue.pick(held, offers) == chosen


@pytest.mark.parametrize(
    ("remembered", "arena", "committed", "refused"),
    [(40, set(), {20, 40}, False), (40, set(), {20}, True), (40, {45}, {20}, False), (40, {30}, set(), True), (None, set(), set(), False)],
    ids=["it is there", "it is gone", "a newer one is in memory", "an older one is in memory", "nothing ever was"],
)  # fmt: skip
def test_the_newest_commit_is_missed_when_it_is_gone(
    remembered: int | None, arena: set[int], committed: set[int], *, refused: bool
) -> None:
    """So that an older one, or a start from nothing, never comes in silence."""
    lost = None if remembered is None else (remembered, (1, 0))
    found = choose.missing(lost, dict.fromkeys(arena, (1, 0)), dict.fromkeys(committed, (1, 0)))
    assert bool(found) is refused


def test_the_newest_commit_is_missed_though_larger_steps_of_a_branch_that_was_left_are_there() -> None:
    """The newest is the one that was committed last; a snapshot of the branch that was left does not stand in for it."""
    assert choose.missing((3, (1, 1)), {5: (1, 0)}, {4: (1, 0)})
    assert not choose.missing((3, (1, 1)), {2: (2, 0)}, {4: (1, 0)})


def test_pods_that_wait_in_the_store_follow_the_one_that_has_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They look again and again whether somebody meets elsewhere, long before the bound; else it is what it was."""
    monkeypatch.setattr(watchdog_module, "LOOK_S", 0.05)
    watch = Watchdog(storage_timeout_s=1.0, store_timeout_s=1.0)
    looks: list[Wait | None] = []

    def moved() -> bool:
        looks.append(watch.report())
        return storage.is_used(LocalFolder(str(tmp_path)), SESSION)

    waiting = WatchedExchange(StorageExchange(LocalFolder(str(tmp_path / "store")), SESSION, PODS, 0), watch, moved)
    with pytest.raises(BarrierTimeout) as caught:
        waiting.receive("plan", 0.12)
    assert len(looks) > 1
    assert {look.kind for look in looks if look is not None} == {WaitKind.STORAGE}, (
        "storage that hangs there is noticed too"
    )
    assert caught.value.waited_s >= 0.12
    pod(tmp_path, 2)
    begun = time.monotonic()
    with pytest.raises(protocol.StoreLost):
        waiting.receive("plan", Deadline.REPLY.s)
    assert time.monotonic() - begun < Deadline.REPLY.s / 2
    assert watch.report() is None


def test_a_pod_that_leaves_the_store_says_again_what_lies_there(tmp_path: Path) -> None:
    """
    A layout is published once: a coordinator whose executor is replaced afterwards looks for it where the pods meet by then. So does a
    pod that could not hear what the last rescue decided.
    """
    context = types.SimpleNamespace(
        store_lost=False, root=LocalFolder(str(tmp_path)), session=SESSION, pods=PODS, first_rank=2, agreed=Agreements(), watch=Watchdog(storage_timeout_s=1.0, store_timeout_s=1.0), finished_phases=["x"], finished_names=["z"],
        finished_loads=["y"], coordinator=True, generation=7,
        last_choice=("rescue/0/choice", {"step": 5, "missing": []}),
    )  # fmt: skip
    context.agreed.layouts["a"] = cast("Any", object())
    said: list[bool] = []

    def operation() -> None:
        if not context.store_lost:
            raise protocol.StoreLost("gone")
        said.append(not context.agreed.layouts and not context.agreed.published())

    with_failover(cast("Context", context), operation)
    assert said == [True]
    assert pod(tmp_path, 0).receive("generation", 0.0) == {"generation": 7}
    assert pod(tmp_path, 2).receive("rescue/0/choice", 0.0)["step"] == 5


def test_a_watch_reports_the_thread_that_is_nearest_to_its_bound() -> None:
    """One thread that is done does not hide another that stands still."""
    watch = Watchdog(storage_timeout_s=0.0, store_timeout_s=100.0)
    watch.storage("write file")

    def beside() -> None:
        watch.begins(WaitKind.PEERS, "plan", 100.0)
        watch.idle()

    other = threading.Thread(target=beside)
    other.start()
    other.join()
    report = watch.report()
    assert report is not None
    assert (report.kind, report.what) == (WaitKind.STORAGE, "write file")
    assert report.for_s > report.bound_s
    watch.moved()
    begun = time.monotonic()
    again = watch.report()
    assert again is not None
    assert again.for_s <= time.monotonic() - begun + report.for_s
    watch.idle()
    assert watch.report() is None
