"""
Tests of a folder in a bucket whose store fails, loses answers, or says no: what is written then, and what the error says.

Called from: pytest.
"""

import errno
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Final

import pytest

from pillion.errors import CommitError
from pillion.wire import names
from pillion_sidecar.storage import blocks, object_client, object_errors, object_probe, object_requests
from pillion_sidecar.storage.objects import ObjectFolder
from pillion_sidecar.storage.stretches import Piece, Run
from storage_contract.buckets import open_bucket
from storage_contract.documents import PUBLISHED, documents, generation_of
from support import deadlines
from support.deadlines import Deadline
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.faults import Fault
from support.object_stores.operations import Only, Operation

TIMEOUT_S: Final = 10.0
"""Bound of one request here; the bounds of production are the same code with other numbers. A busy machine answers late."""
SHORT_S: Final = 1.0
"""The same where the test is one of the bound itself."""
PUTS: Final = Only(operation=Operation.PUT)
CONDITIONAL: Final = Only(operation=Operation.PUT, conditional=True)
GETS: Final = Only(operation=Operation.GET)
AMBIGUOUS: Final = (Fault.CUT_AFTER, Fault.FAILED_AFTER, Fault.CONFLICT, Fault.CUT_BEFORE, Fault.SLOW_DOWN)
"""Faults after which a client cannot know, from the answer, whether its conditional put was applied."""


@pytest.fixture
def folder(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> ObjectFolder:
    """A step's folder by way of the proxy, whose client has little patience."""
    have_patience(monkeypatch, TIMEOUT_S)
    monkeypatch.setattr(object_client, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(object_client, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(object_client, "MAX_RETRIES", 4)
    return open_bucket(proxy.place, monkeypatch).below("run/step-1")


def have_patience(monkeypatch: pytest.MonkeyPatch, timeout_s: float) -> None:
    """Let a client that is made from now on wait so long for a request, on a quiet machine."""
    scaled_s = timeout_s * deadlines.Deadline.REPLY.s / deadlines.Deadline.REPLY.quiet_s
    for name in ("DOCUMENT_TIMEOUT_S", "DOCUMENT_RETRIES_S", "BULK_TIMEOUT_S", "BULK_RETRIES_S"):
        monkeypatch.setattr(object_client, name, scaled_s)
    monkeypatch.setattr(object_requests, "CALL_S", 2 * scaled_s)


def publish(folder: ObjectFolder, generation: str) -> None:
    folder.publish(documents(generation), generation=generation, generation_of=generation_of)


@pytest.mark.parametrize("fault", AMBIGUOUS)
def test_a_create_whose_answer_says_nothing_is_made_out(proxy: FaultProxy, folder: ObjectFolder, fault: Fault) -> None:
    """A create that was applied is ours although its answer was lost or an error; one that was not is made again; the next one loses."""
    armed = proxy.arm(fault, CONDITIONAL)
    assert folder.create("7", b"mine")
    assert len(armed.struck) == 1
    assert folder.read("7") == b"mine"
    proxy.arm(fault, CONDITIONAL)
    assert not folder.create("7", b"other")
    assert folder.read("7") == b"mine"


@pytest.mark.parametrize("fault", AMBIGUOUS)
@pytest.mark.parametrize("skip", [0, 1])
def test_a_commit_whose_answer_says_nothing_is_made_out(
    proxy: FaultProxy, folder: ObjectFolder, fault: Fault, skip: int
) -> None:
    """Whichever of the two puts of a commit it befalls, the commit is whole afterwards, and an older attempt is refused."""
    publish(folder, "1")
    armed = proxy.arm(fault, CONDITIONAL, skip=skip)
    publish(folder, "2")
    assert len(armed.struck) == 1
    assert [generation_of(folder.read(name)) for name in PUBLISHED] == ["2", "2"]
    with pytest.raises(CommitError):
        publish(folder, "1")


@pytest.mark.parametrize(
    "fault", [Fault.SLOW_DOWN, Fault.TOO_MANY, Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.FAILED_AFTER]
)
def test_what_passes_by_itself_is_repeated(proxy: FaultProxy, folder: ObjectFolder, fault: Fault) -> None:
    """One answer that asks for patience, or one connection that breaks, is no error of any request that may be made twice."""
    proxy.arm(fault, PUTS)
    folder.put("file", b"12345")
    for only in (GETS, Only(operation=Operation.LIST), Only(operation=Operation.HEAD)):
        proxy.arm(fault, only)
    assert folder.read("file") == b"12345"
    assert list(folder.files()) == ["file"]
    assert folder.entry("file") is not None
    proxy.arm(fault, Only(operation=Operation.DELETE))
    folder.delete(["file"])
    assert folder.files() == {}


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        (Fault.SLOW_DOWN, errno.EAGAIN),
        (Fault.TOO_MANY, errno.EAGAIN),
        (Fault.DENIED, errno.EACCES),
        (Fault.EXPIRED, errno.EACCES),
        (Fault.FULL, errno.ENOSPC),
        (Fault.NO_BUCKET, object_errors.NO_BUCKET),
    ],
)
def test_what_stays_is_an_error_that_names_it(
    proxy: FaultProxy, folder: ObjectFolder, fault: Fault, number: int
) -> None:
    """What the store says all the time is an OSError with the errno for it and the URL, of every call, and never "there is none"."""
    proxy.arm(fault, times=None)
    memory = memoryview(bytearray(100))
    calls: dict[str, Callable[[], object]] = {
        "files": folder.files,
        "folders": folder.folders,
        "entry": lambda: folder.entry("file"),
        "read": lambda: folder.read("file"),
        "read_piece": lambda: folder.read_piece("file", 0, 10),
        "read_into": lambda: folder.read_into("file", memory, [Piece(0, 0, 10)]),
        "put": lambda: folder.put("file", b"x"),
        "create": lambda: folder.create("file", b"x"),
        "overwrite": lambda: folder.overwrite("file", b"x"),
        "write": lambda: folder.write({"file": [Run(0, 10)]}, memory, num_threads=1),
        "delete": lambda: folder.delete(["file", "other"]),
        "publish": lambda: publish(folder, "1"),
        "take_down": lambda: folder.take_down(by=1, generation_of=generation_of, marker=names.COMMIT_MARKER),
    }
    for name, call in calls.items():
        with pytest.raises(OSError, match=r".") as caught:
            call()
        assert (caught.value.errno, name) == (number, name), caught.value
        assert str(caught.value.filename).startswith(str(folder).partition("/run")[0])
    problems = folder.check()
    assert len(problems) == 1
    assert str(folder) in problems[0]


def test_one_404_is_no_absence(proxy: FaultProxy, folder: ObjectFolder) -> None:
    """An object that a listing has is read, although the store has just said that it is not there."""
    folder.put("file", b"12345")
    proxy.arm(Fault.NO_BUCKET, GETS)
    assert folder.read("file") == b"12345"
    proxy.arm(Fault.NO_BUCKET, Only(operation=Operation.HEAD))
    assert folder.entry("file") is not None


@pytest.mark.parametrize("object_server", ["gcs"], indirect=True)
@pytest.mark.parametrize("fault", [Fault.HANG, Fault.STALL_DOWNLOAD, Fault.STALL_UPLOAD])
def test_a_store_that_hangs_is_left_at_the_bound(
    proxy: FaultProxy, folder: ObjectFolder, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that takes a request and never answers is an error within the bound of the retries and one request more."""
    folder.put("file", bytes(100_000))
    memory = memoryview(bytearray(100_000))
    have_patience(monkeypatch, SHORT_S)
    folder = open_bucket(proxy.place, monkeypatch).below("run/step-1")
    proxy.arm(fault, times=None)
    bound_s = object_client.BULK_RETRIES_S + object_client.BULK_TIMEOUT_S + TIMEOUT_S
    begun_s = time.monotonic()
    if fault is Fault.STALL_UPLOAD:
        with pytest.raises(OSError, match=r".") as caught:
            folder.write({"new": [Run(0, 100_000)]}, memory, num_threads=1)
    else:
        with pytest.raises(OSError, match=r".") as caught:
            folder.read_into("file", memory, [Piece(0, 0, 100_000)])
    assert time.monotonic() - begun_s < bound_s
    assert caught.value.errno == errno.ETIMEDOUT, caught.value
    proxy.disarm()
    proxy.release()
    assert "new" not in folder.files()


def test_an_answer_that_breaks_off_is_never_taken_for_the_whole(proxy: FaultProxy, folder: ObjectFolder) -> None:
    """A download that breaks in the middle is asked for again, and the bytes are right; one that always does is an error."""
    content = bytes(range(256)) * 400
    folder.put("file", content)
    proxy.arm(Fault.TRUNCATE, GETS)
    memory = bytearray(len(content))
    folder.read_into("file", memoryview(memory), [Piece(0, 0, len(content))])
    assert memory == content
    proxy.arm(Fault.TRUNCATE, GETS, times=None)
    with pytest.raises(OSError, match=r".") as caught:
        folder.read_into("file", memoryview(memory), [Piece(0, 0, len(content))])
    assert caught.value.errno not in (None, errno.ENOENT)


def test_a_save_that_is_tried_again_sends_what_is_missing(proxy: FaultProxy, folder: ObjectFolder) -> None:
    """After an error one listing shows what is there; only the rest is sent, each object by one request."""
    memory = memoryview(bytes(range(200)) * 1000)
    files = {f"__0_{number}.1.distcp": [Run(number * 1000, 500), Run(number * 1000 + 700, 100)] for number in range(6)}
    proxy.arm(Fault.DENIED, Only(operation=Operation.PUT, key="__0_3"))
    with pytest.raises(PermissionError):
        folder.write(files, memory, num_threads=1)
    there = folder.files().keys()
    assert "__0_3.1.distcp" not in there
    proxy.forget()
    told: list[tuple[str, int]] = []
    folder.write(files, memory, num_threads=1, on_progress=lambda *each: told.append(each))
    assert {each.key.rpartition("/")[2] for each in proxy.seen(PUTS)} == files.keys() - there
    assert len(proxy.seen(PUTS)) == len(files.keys() - there)
    assert len(proxy.seen(Only(operation=Operation.LIST))) == 1
    assert len(proxy.seen()) == 1 + len(files.keys() - there)
    assert dict(told) == dict.fromkeys(files, 600)
    for number in range(6):
        start = number * 1000
        stored = folder.read(f"__0_{number}.1.distcp")
        assert stored == bytes(memory[start : start + 500]) + bytes(memory[start + 700 : start + 800])


def test_a_quota_is_no_room_and_no_wrong_credential(proxy: FaultProxy, folder: ObjectFolder) -> None:
    """Some stores refuse by 403 what does not fit into a quota. Room is made for it, as on a full disk."""
    proxy.arm(Fault.QUOTA, PUTS, times=None)
    writes: list[Callable[[], None]] = [
        lambda: folder.put("file", b"x"),
        lambda: folder.write({"file": [Run(0, 10)]}, memoryview(bytes(10)), num_threads=1),
    ]
    for write in writes:
        with pytest.raises(OSError, match="QuotaExceeded") as raised:
            write()
        assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("object_server", ["gcs"], indirect=True)
def test_an_error_ends_the_waiting_of_the_others(
    proxy: FaultProxy, folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects that wait for the bandwidth limit are not sent when one has failed, and its error is the one that is raised."""
    slow = open_bucket(proxy.place, monkeypatch, bandwidth_limit_bytes=1).below("run/step-1")
    waits_s = 5 * 10
    proxy.arm(Fault.DENIED, PUTS)
    begun_s = time.monotonic()
    with pytest.raises(PermissionError):
        slow.write({f"file-{number}": [Run(0, 10)] for number in range(6)}, memoryview(bytes(10)), num_threads=1)
    assert time.monotonic() - begun_s < waits_s
    assert len(proxy.seen(PUTS)) == 1
    assert folder.files() == {}


@pytest.mark.parametrize("object_server", ["gcs"], indirect=True)
def test_a_pause_of_the_limit_is_told_apart_from_a_store_that_hangs(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the limit lets nothing be sent, progress is reported again and again; while a request waits for the store, it is not."""
    monkeypatch.setattr(blocks, "WAIT_S", 0.05)
    slow = open_bucket(proxy.place, monkeypatch, bandwidth_limit_bytes=10).below("run/step-1")
    files = {"first": [Run(0, 10)], "second": [Run(0, 10)]}
    told: list[tuple[str, int]] = []
    begun_s = time.monotonic()
    slow.write(files, memoryview(bytes(10)), num_threads=1, on_progress=lambda *each: told.append(each))
    assert time.monotonic() - begun_s >= 1.0
    assert told.count(("second", 0)) >= 5
    assert (told[0], told[-1]) == (("first", 10), ("second", 10))

    proxy.arm(Fault.HANG, PUTS)
    told.clear()
    # Its own limit: the one before has not had its time yet.
    again = open_bucket(proxy.place, monkeypatch, bandwidth_limit_bytes=10).below("run/step-2")
    with futures.ThreadPoolExecutor(1) as pool:
        writing = pool.submit(
            again.write,
            {"first": [Run(0, 10)]},
            memoryview(bytes(10)),
            num_threads=1,
            on_progress=lambda *each: told.append(each),
        )
        deadlines.eventually(lambda: proxy.num_held, Deadline.REPLY, "the request hangs")
        num_told = len(told)
        # Longer than ten reports would take.
        assert not futures.wait([writing], 0.5).done
        assert len(told) == num_told
        proxy.release()
        writing.result(Deadline.REPLY.s)
    assert told[-1] == ("first", 10)


def test_what_is_shorter_than_it_should_be_is_sent_again(folder: ObjectFolder) -> None:
    """A listing with another length is no reason to leave an object out."""
    folder.put("__0_0.1.distcp", b"short")
    folder.write({"__0_0.1.distcp": [Run(0, 10)]}, memoryview(b"0123456789"), num_threads=1)
    assert folder.read("__0_0.1.distcp") == b"0123456789"


def test_a_batch_with_what_is_gone_deletes_the_rest(proxy: FaultProxy, folder: ObjectFolder) -> None:
    """Some stores call a missing key of a batch an error: the others go all the same."""
    for number in range(0, 30, 2):
        folder.put(f"file-{number}", b"x")
    folder.delete([f"file-{number}" for number in range(30)])
    assert folder.files() == {}
    proxy.forget()
    folder.delete(["none"])
    assert len(proxy.seen()) <= 2


def test_a_store_that_ignores_conditions_is_refused(proxy: FaultProxy, folder: ObjectFolder) -> None:
    """Where a second create succeeds the check says so: two attempts could overwrite each other."""
    proxy.arm(Fault.UNCONDITIONAL, CONDITIONAL, times=None)
    assert folder.check() == [
        f"the root {folder} cannot be used: {object_probe.NOT_CONDITIONAL.format('If-None-Match')}"
    ]
    proxy.disarm()
    proxy.arm(Fault.UNCONDITIONAL, CONDITIONAL, skip=3)
    assert folder.check() == [f"the root {folder} cannot be used: {object_probe.NOT_CONDITIONAL.format('If-Match')}"]
    proxy.disarm()
    assert folder.check() == []


def test_a_tombstone_hides_from_everybody_but_a_commit(proxy: FaultProxy, folder: ObjectFolder) -> None:
    """What is being removed is not committed, whoever asks, and its marker goes last."""
    publish(folder, "1")
    aside = folder.take_down(by=1, generation_of=generation_of, marker=names.COMMIT_MARKER)
    assert aside is not None
    assert sorted(folder.files()) == [names.MANIFEST]
    folder.remove_if_empty()
    aside.delete(aside.files())
    with pytest.raises(FileNotFoundError):
        folder.take_down(by=1, generation_of=generation_of, marker=names.COMMIT_MARKER)
    proxy.forget()
    folder.remove_if_empty()
    assert (
        len(proxy.seen(Only(operation=Operation.DELETE))) + len(proxy.seen(Only(operation=Operation.DELETE_MANY))) == 1
    )


@pytest.mark.parametrize("seed", range(3))
def test_attempts_at_once_behind_a_bad_store(proxy: FaultProxy, folder: ObjectFolder, seed: int) -> None:
    """Four attempts commit one step while a fifth of all requests fail: whoever was told "committed" stands, or a newer one does."""
    attempts = ("1", "2", "3", "4")
    proxy.arm_at_random(list(AMBIGUOUS), rate=0.2, seed=seed)
    barrier = threading.Barrier(len(attempts))

    def go(generation: str) -> bool | None:
        barrier.wait()
        try:
            publish(folder, generation)
        except CommitError:
            return False
        except OSError:
            return None  # its retries are used up: not known
        return True

    with futures.ThreadPoolExecutor(len(attempts)) as pool:
        said = dict(zip(attempts, pool.map(go, attempts), strict=True))
    proxy.disarm()
    newest = max((int(attempt) for attempt, committed in said.items() if committed), default=0)
    assert said["4"] is not False, said
    if newest:
        ends = [int(generation_of(folder.read(name)) or 0) for name in PUBLISHED]
        assert min(ends) >= newest, (said, ends)
        assert newest < 4 or ends == [4, 4]
