"""
The whole of: what a real client of an object store sees of each fault, and what the store has by then.

Called from: pytest.
Must never: use Pillion's own client: what is proved here is the tests' instrument.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import pytest
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from support import deadlines
from support.deadlines import Deadline
from support.object_stores.fault_proxy import FaultProxy
from support.object_stores.faults import Fault
from support.object_stores.operations import Only, Operation
from support.object_stores.places import Client, Place

SHORT_S = 0.5
"""Bound of a request that is to fail by it."""
BIG = bytes(range(256)) * (1 << 17)
"""32 MiB: more than the sockets between client and proxy can hold."""

REFUSED: dict[Fault, tuple[type[Exception], ...]] = {
    Fault.SLOW_DOWN: (GenericError,),
    Fault.TOO_MANY: (GenericError,),
    Fault.EXPIRED: (GenericError, UnauthenticatedError, PermissionDeniedError),
    Fault.DENIED: (PermissionDeniedError,),
    Fault.NO_BUCKET: (FileNotFoundError,),
    Fault.FULL: (GenericError,),
    Fault.QUOTA: (PermissionDeniedError,),
}
"""What obstore raises of it, which may differ from store to store."""


def once(proxy: FaultProxy, *, timeout_s: float | None = None) -> Client:
    """A client that does not try again."""
    return proxy.place.client(timeout_s=timeout_s, max_retries=0)


def behind(proxy: FaultProxy) -> dict[str, bytes]:
    """What the store has, asked for after the faults are over."""
    proxy.disarm()
    client = proxy.place.client()
    return {each["path"]: bytes(client.get(each["path"]).bytes()) for each in client.list().collect()}


@contextlib.contextmanager
def doing(work: Callable[[], object]) -> Iterator["futures.Future[object]"]:
    """A call that goes on beside the test."""
    with futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def test_without_a_fault_the_proxy_changes_nothing(proxy: FaultProxy, bucket: Place) -> None:
    """What is written through it is in the store, and what is there is read through it."""
    client = once(proxy)
    client.put("a/one", b"1234567890", use_multipart=False)
    client.put("a/two of ~ two", b"", mode="create")
    client.put("three", iter([memoryview(b"12"), memoryview(b"34")]), use_multipart=False)
    direct = bucket.client()
    assert bytes(direct.get("a/one").bytes()) == b"1234567890"
    assert bytes(client.get_range("a/one", start=2, end=5)) == b"345"
    assert client.head("three")["size"] == 4
    assert {each["path"]: each["size"] for each in client.list().collect()} == {
        "a/one": 10,
        "a/two of ~ two": 0,
        "three": 4,
    }
    assert client.list_with_delimiter()["common_prefixes"] == ["a"]
    client.delete("a/one")
    with pytest.raises(FileNotFoundError):
        direct.get("a/one")


def test_requests_and_bytes_are_counted(proxy: FaultProxy) -> None:
    """Each request is told from the others by what it asks, in the order in which they came."""
    client = once(proxy)
    client.put("step-1/.metadata", b"12345", mode="create")
    there = client.get("step-1/.metadata")
    assert len(bytes(there.bytes())) == 5
    version = {name: there.meta[name] for name in ("e_tag", "version") if there.meta[name] is not None}
    client.put("step-1/.metadata", b"123", mode=version)  # type: ignore[arg-type]
    client.list_with_delimiter("step-1")
    client.get_range("step-1/.metadata", start=1, end=3)
    client.delete(["step-1/.metadata"])
    asked = [each.operation for each in proxy.seen()]
    assert asked[:5] == [Operation.PUT, Operation.GET, Operation.PUT, Operation.LIST, Operation.GET]
    assert asked[5:] in ([Operation.DELETE], [Operation.DELETE_MANY])
    puts = proxy.seen(Only(operation=Operation.PUT))
    assert [(each.key, each.conditional, each.num_bytes_up) for each in puts] == [
        ("step-1/.metadata", True, 5),
        ("step-1/.metadata", True, 3),
    ]
    gets = proxy.seen(Only(operation=Operation.GET, key="metadata$"))
    assert [(each.num_bytes_down, each.range) for each in gets] == [(5, None), (2, "bytes=1-2")]
    assert proxy.seen(Only(operation=Operation.LIST))[0].key == "step-1/"
    proxy.forget()
    assert proxy.seen() == []


@pytest.mark.parametrize("fault", REFUSED)
def test_a_refusal_is_raised_and_nothing_is_applied(proxy: FaultProxy, fault: Fault) -> None:
    """One try, one error of the class that the client has for it, and the store as it was."""
    armed = proxy.arm(fault)
    with pytest.raises(REFUSED[fault]):
        once(proxy).put("key", b"data")
    assert [each.fault for each in armed.struck] == [fault.name]
    assert behind(proxy) == {}


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.TOO_MANY, Fault.CUT_BEFORE])
def test_the_client_outlives_two_of_them(proxy: FaultProxy, fault: Fault) -> None:
    """What a client tries again it is let through with at the third try."""
    proxy.arm(fault, Only(operation=Operation.GET), times=2)
    client = proxy.place.client(max_retries=3)
    client.put("key", b"data")
    assert bytes(client.get("key").bytes()) == b"data"
    assert [each.fault for each in proxy.seen(Only(operation=Operation.GET))] == [fault.name, fault.name, None]


def test_a_conflict_is_taken_for_an_object_that_is_there(proxy: FaultProxy) -> None:
    """409 says that somebody writes at this moment. The client says "already exists", and there is nothing."""
    proxy.arm(Fault.CONFLICT)
    client = once(proxy)
    client.put("other", b"a put without a condition is not struck")
    with pytest.raises(AlreadyExistsError):
        client.put("key", b"data", mode="create")
    assert set(behind(proxy)) == {"other"}


def test_a_precondition_fails_by_order(proxy: FaultProxy) -> None:
    """The version was right, and the store says that it was not."""
    client = once(proxy)
    written = client.put("key", b"old")
    version = {name: written[name] for name in ("e_tag", "version") if written[name] is not None}
    proxy.arm(Fault.PRECONDITION)
    with pytest.raises(PreconditionError):
        client.put("key", b"new", mode=version)  # type: ignore[arg-type]
    assert behind(proxy) == {"key": b"old"}


@pytest.mark.parametrize("fault", [Fault.FAILED_AFTER, Fault.CUT_AFTER])
def test_an_answer_that_is_lost_leaves_what_was_applied(proxy: FaultProxy, fault: Fault) -> None:
    """The client has an error in its hands, the store has the object."""
    proxy.arm(fault)
    with pytest.raises(GenericError):
        once(proxy).put("key", b"data", mode="create")
    assert behind(proxy) == {"key": b"data"}


def test_a_put_that_is_tried_again_after_500_collides_with_itself(proxy: FaultProxy) -> None:
    """The first try was applied, so the second is refused: "already exists", and it is ours."""
    proxy.arm(Fault.FAILED_AFTER)
    with pytest.raises(AlreadyExistsError):
        proxy.place.client(max_retries=1).put("key", b"data", mode="create")
    assert behind(proxy) == {"key": b"data"}


def test_a_cut_before_it_was_applied_leaves_nothing(proxy: FaultProxy) -> None:
    """The store never heard of it."""
    proxy.arm(Fault.CUT_BEFORE)
    with pytest.raises(GenericError):
        once(proxy).put("key", b"data")
    assert behind(proxy) == {}


def test_a_request_that_hangs_arrives_when_it_is_released(proxy: FaultProxy) -> None:
    """The client has given up long since, and its put takes effect all the same, as on a network."""
    proxy.arm(Fault.HANG, Only(operation=Operation.PUT))
    begun = time.monotonic()
    with pytest.raises(BaseError):
        once(proxy, timeout_s=SHORT_S).put("key", b"data")
    assert time.monotonic() - begun >= SHORT_S
    assert behind(proxy) == {}
    assert proxy.num_held == 1
    proxy.release()
    deadlines.eventually(lambda: behind(proxy) == {"key": b"data"}, Deadline.REPLY, "the late put arrives")
    assert proxy.num_held == 0


def test_a_released_request_is_answered(proxy: FaultProxy) -> None:
    """A client that waits for long enough notices nothing."""
    proxy.arm(Fault.HANG)
    with doing(lambda: once(proxy).put("key", b"data")) as put:
        deadlines.eventually(lambda: proxy.num_held == 1, Deadline.REPLY, "the put hangs")
        proxy.release()
        put.result(Deadline.REPLY.s)
    assert behind(proxy) == {"key": b"data"}


def test_an_answer_that_hangs_is_of_what_was_applied(proxy: FaultProxy) -> None:
    """The store has it, the client does not know."""
    proxy.arm(Fault.HANG_AFTER)
    with pytest.raises(BaseError):
        once(proxy, timeout_s=SHORT_S).put("key", b"data")
    assert behind(proxy) == {"key": b"data"}


def test_an_upload_stalls_in_mid_body(proxy: FaultProxy) -> None:
    """Half of the body is taken, then nothing more: the client's own bound ends it, and the store has nothing."""
    proxy.arm(Fault.STALL_UPLOAD)
    with pytest.raises(BaseError):
        once(proxy, timeout_s=SHORT_S).put("key", BIG, use_multipart=False)
    (put,) = proxy.seen()
    assert put.num_bytes_up == len(BIG) // 2
    assert behind(proxy) == {}


def test_a_download_stalls_in_mid_body(proxy: FaultProxy) -> None:
    """Half of the body comes, and then nothing more within the client's bound."""
    once(proxy).put("key", b"0123456789")
    proxy.arm(Fault.STALL_DOWNLOAD, Only(operation=Operation.GET))
    with pytest.raises(BaseError):
        once(proxy, timeout_s=SHORT_S).get("key").bytes()
    assert proxy.seen(Only(operation=Operation.GET))[0].num_bytes_down == 5


def test_a_download_ends_in_mid_body(proxy: FaultProxy) -> None:
    """A client that does not try again has an error, not half an object."""
    once(proxy).put("key", b"0123456789")
    proxy.arm(Fault.TRUNCATE, Only(operation=Operation.GET), times=None)
    with pytest.raises(BaseError):
        once(proxy).get("key").bytes()


def test_one_bit_is_another_one(proxy: FaultProxy) -> None:
    """Nobody but a digest sees it."""
    once(proxy).put("key", b"0123456789")
    proxy.arm(Fault.FLIP, Only(operation=Operation.GET))
    assert bytes(once(proxy).get("key").bytes()) == b"01234\x346789"


def test_a_late_request_waits(proxy: FaultProxy) -> None:
    """Each request takes as long as it is told, and goes its way then."""
    proxy.arm(Fault.LATE, times=None, delay_s=0.1)
    begun = time.monotonic()
    client = once(proxy)
    client.put("key", b"data")
    assert bytes(client.get("key").bytes()) == b"data"
    assert time.monotonic() - begun >= 0.2


def test_a_store_that_ignores_conditions_lets_everyone_win(proxy: FaultProxy) -> None:
    """Two creates of one key both succeed, and so does a put over a version that is gone."""
    proxy.arm(Fault.UNCONDITIONAL, times=None)
    client = once(proxy)
    written = client.put("key", b"first", mode="create")
    client.put("key", b"second", mode="create")
    version = {name: written[name] for name in ("e_tag", "version") if written[name] is not None}
    client.put("key", b"third", mode=version)  # type: ignore[arg-type]
    assert behind(proxy) == {"key": b"third"}


def test_a_fault_strikes_those_that_are_meant(gcs_proxy: FaultProxy) -> None:
    """Skipped ones, other keys, and all after the last time go through; the fault that was armed first comes first."""
    client = once(gcs_proxy)
    first = gcs_proxy.arm(Fault.SLOW_DOWN, Only(method="PUT", key=r"\.metadata$"), skip=1, times=1)
    second = gcs_proxy.arm(Fault.DENIED, Only(conditional=True), times=None)
    client.put("a/.metadata", b"skipped")
    client.put("a/manifest.json", b"another key")
    with pytest.raises(GenericError):
        client.put("b/.metadata", b"met by the first", mode="create")
    with pytest.raises(PermissionDeniedError):
        client.put("b/.metadata", b"met by the second", mode="create")
    assert [len(first.struck), len(second.struck)] == [1, 1]
    assert set(behind(gcs_proxy)) == {"a/.metadata", "a/manifest.json"}


def test_a_seed_strikes_the_same_requests_again(gcs_bucket: Place) -> None:
    """Some of a hundred fail, which is a matter of the seed alone."""

    def run(seed: int) -> list[str | None]:
        with FaultProxy(gcs_bucket) as proxy:
            proxy.arm_at_random([Fault.SLOW_DOWN, Fault.CUT_BEFORE, Fault.CONFLICT], rate=0.25, seed=seed)
            client = once(proxy)
            for key in map(str, range(100)):
                with contextlib.suppress(BaseError):
                    client.put(key, b"")
            return [each.fault for each in proxy.seen()]

    struck = run(7)
    assert struck == run(7) != run(8)
    assert set(struck) == {None, "SLOW_DOWN", "CUT_BEFORE"}, "a put without a condition meets no conflict"
    assert 10 <= sum(each is not None for each in struck) <= 45


def test_what_nobody_releases_ends_by_its_bound(gcs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that forgets to release has an error, and does not hang."""
    client = once(gcs_proxy, timeout_s=Deadline.REPLY.s)
    monkeypatch.setenv(deadlines.SCALE_VARIABLE, "0.005")
    gcs_proxy.arm(Fault.HANG)
    with pytest.raises(GenericError):
        client.put("key", b"data")
    monkeypatch.undo()
    assert behind(gcs_proxy) == {}


def test_a_proxy_ends_with_requests_that_hang(gcs_bucket: Place) -> None:
    """The end of a test needs nobody's release."""
    with FaultProxy(gcs_bucket) as proxy:
        proxy.arm(Fault.HANG, times=None)
        numbers = itertools.count()
        client = once(proxy)
        with futures.ThreadPoolExecutor(3) as pool:
            puts = [pool.submit(client.put, f"key-{next(numbers)}", b"data") for _ in range(3)]
            deadlines.eventually(lambda: proxy.num_held == 3, Deadline.REPLY, "three puts hang")
            proxy.__exit__()
            assert all(isinstance(put.exception(Deadline.REPLY.s), BaseError) for put in puts)
        proxy.__enter__()
