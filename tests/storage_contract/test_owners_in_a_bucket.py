"""
Tests of who owns a root in a bucket, where each sign of life costs a request and the store sets all time stamps.

Called from: pytest.
"""

import dataclasses
import time
from typing import Final

import pytest

from pillion.errors import UsageError
from pillion_sidecar.checkpoint import commit, ownership
from pillion_sidecar.checkpoint.ownership import Lease, Record
from pillion_sidecar.session.state import State
from pillion_sidecar.storage.local import LocalFolder
from pillion_sidecar.storage.objects import ObjectFolder
from storage_contract.buckets import open_bucket
from support import deadlines
from support.deadlines import Deadline
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.operations import Only, Operation

FIRST: Final = Record(session="a" * 32, name="Job llm (pod team/llm-0)")
SECOND: Final = Record(session="b" * 32, name="Job sweep (pod team/sweep-1)")
SETTING_S: Final = 0.2
"""`owner_silent_s`, shortened: the silence is nine times as long."""
SECONDS_A_DAY: Final = 86_400


@pytest.fixture
def bucket_root(gcs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> ObjectFolder:
    """A root in a bucket that holds nothing yet. The fake's time stamps have milliseconds."""
    monkeypatch.setattr(ownership, "LOOK_S", 0.02)
    return open_bucket(gcs_proxy.place, monkeypatch).below("runs/one")


def own(root: ObjectFolder, record: Record = FIRST) -> int:
    """Claim the root, and show no sign of life any more."""
    return ownership.claim(root, record, silent_s=SETTING_S)[0]


def test_a_day_of_signs_of_life_costs_some_three_thousand_requests_and_two_may_be_late(
    bucket_root: ObjectFolder,
) -> None:
    """A directory keeps its two seconds. No setting makes a living owner's record stale."""
    bucket = ownership.rhythm(bucket_root, 10.0)
    assert SECONDS_A_DAY / bucket.beat_s < 3000
    assert bucket.silent_s >= 3 * bucket.beat_s
    assert ownership.rhythm(LocalFolder("/runs"), 10.0).beat_s == 2.0
    for folder in (bucket_root, LocalFolder("/runs")):
        for setting_s in (1.0, 10.0, 300.0):
            owners = ownership.rhythm(folder, setting_s)
            assert owners.stale_s >= owners.silent_s >= 3 * owners.beat_s


def test_a_living_owner_refuses_a_newcomer_by_its_next_sign_of_life(bucket_root: ObjectFolder) -> None:
    """With both names; and the owner still commits."""
    number, record = ownership.claim(bucket_root, FIRST, silent_s=SETTING_S)
    beat_s = ownership.rhythm(bucket_root, SETTING_S).beat_s
    lease = Lease(bucket_root, number, record, beat_s=beat_s, state=State.TRAINING)
    try:
        with pytest.raises(UsageError) as raised:
            ownership.claim(bucket_root, SECOND, silent_s=SETTING_S)
    finally:
        lease.close()
    assert FIRST.name in str(raised.value)
    assert SECOND.name in str(raised.value)
    commit.fence(bucket_root, number)


def test_each_sign_of_life_is_one_put(bucket_root: ObjectFolder, gcs_proxy: FaultProxy) -> None:
    """And one reading, which shows that no newer session has removed the record."""
    number, record = ownership.claim(bucket_root, FIRST, silent_s=SETTING_S)
    gcs_proxy.forget()
    lease = Lease(bucket_root, number, record, beat_s=0.05, state=State.TRAINING)
    try:
        deadlines.eventually(
            lambda: len(gcs_proxy.seen(Only(operation=Operation.PUT))) >= 4, Deadline.SETTLE, "it has beaten four times"
        )
    finally:
        lease.close()
    seen = gcs_proxy.seen()
    assert {each.operation for each in seen} == {Operation.GET, Operation.PUT}
    assert abs(len([each for each in seen if each.operation is Operation.PUT]) * 2 - len(seen)) <= 1


def test_a_silent_owner_is_succeeded_when_its_record_is_as_old_as_the_silence(bucket_root: ObjectFolder) -> None:
    """The silence counts from the last sign of life, and not from the newcomer's first look."""
    begun = time.monotonic()
    assert own(bucket_root) == 1
    silent_s = ownership.rhythm(bucket_root, SETTING_S).silent_s
    deadlines.eventually(
        lambda: time.monotonic() - begun > silent_s / 2, Deadline.SETTLE, "half of the silence is over"
    )
    looked = time.monotonic()
    assert own(bucket_root, SECOND) == 2
    assert time.monotonic() - begun >= silent_s * 0.9
    assert time.monotonic() - looked < silent_s
    # Now the record is younger again.
    assert own(bucket_root, dataclasses.replace(SECOND, session="c" * 32)) == 3


def test_an_owner_that_another_pod_of_the_job_served_is_succeeded_at_once_unless_it_drains(
    bucket_root: ObjectFolder,
) -> None:
    """A restart does not wait for a sign of life; the last snapshot of an owner that drains is waited for."""
    assert own(bucket_root) == 1
    begun = time.monotonic()
    number, record = ownership.claim(bucket_root, SECOND, silent_s=Deadline.SETTLE.s, succeeds=lambda _: True)
    assert number == 2
    assert time.monotonic() - begun < Deadline.SETTLE.s
    commit.generations_folder(bucket_root).overwrite("2", dataclasses.replace(record, draining=True).encode())
    begun = time.monotonic()
    third = dataclasses.replace(FIRST, session="c" * 32)
    assert ownership.claim(bucket_root, third, silent_s=SETTING_S, succeeds=lambda _: True)[0] == 3
    assert time.monotonic() - begun >= ownership.rhythm(bucket_root, SETTING_S).silent_s * 0.9
