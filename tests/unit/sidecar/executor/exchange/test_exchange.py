"""
The whole of: how pods exchange documents, the same claims for the exchange within one pod and the one over a store.

Called from: pytest.
Must never: use a store that is no TCPStore; what differs between stores is what matters.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pillion.errors import BarrierTimeout
from pillion_sidecar.executor.exchange import protocol, storage, store_client, tcpstore
from pillion_sidecar.executor.exchange.watchdog import SessionLeft, Watchdog, WatchedExchange
from pillion_sidecar.storage.local import LocalFolder
from support.deadlines import Deadline


def local() -> protocol.Exchange:
    """All ranks in one pod."""
    return protocol.LocalExchange(0)


def over_a_store() -> protocol.Exchange:
    """The coordinator's end of a job of one pod, over a real store on a free port."""
    keep, view = tcpstore.host("127.0.0.1", "pillion/test")
    return tcpstore.StoreExchange(view, keep, [[0]], 0)


@pytest.mark.parametrize("make", [local, over_a_store])
def test_what_is_posted_is_collected_and_what_is_published_is_received(make: Callable[[], protocol.Exchange]) -> None:
    """Documents come back as they were; posting again overwrites, as an executor's successor does it."""
    between = make()
    between.post("save/0/1/plan", {"text": "\u00e9", "n": 1})
    between.post("save/0/1/plan", {"text": "again"})
    assert between.collect("save/0/1/plan", 1.0) == {0: {"text": "again"}}
    between.publish("save/0/1/plan", {"plan": [1, 2]})
    assert between.receive("save/0/1/plan", 1.0) == {"plan": [1, 2]}


@pytest.mark.parametrize("make", [local, over_a_store])
def test_what_never_comes_ends_at_the_bound_with_phase_and_ranks(make: Callable[[], protocol.Exchange]) -> None:
    """BarrierTimeout for a part and for a decision that nobody gave; forgotten phases are gone."""
    between = make()
    for wait in (between.collect, between.receive):
        with pytest.raises(BarrierTimeout) as caught:
            wait("never", 0.05)
        assert (caught.value.phase, caught.value.missing) == ("never", (0,))
    between.post("old", {})
    between.publish("old", {})
    between.forget(["old"])
    with pytest.raises(BarrierTimeout):
        between.collect("old", 0.05)


def two_over_a_store(_: Path) -> protocol.SlicedExchange:
    """The coordinator's end of a job of two pods."""
    keep, view = tcpstore.host("127.0.0.1", "pillion/test")
    return tcpstore.StoreExchange(view, keep, [[0], [1]], 0)


def two_over_storage(root: Path) -> protocol.SlicedExchange:
    """As before, after the store was lost."""
    return storage.StorageExchange(LocalFolder(str(root)), "a" * 32, [[0], [1]], 0)


@pytest.mark.parametrize("make", [two_over_a_store, two_over_storage])
@pytest.mark.parametrize("wait", ["collect", "receive"])
def test_a_wait_for_others_is_left_when_its_session_is_over(
    make: Callable[[Path], protocol.SlicedExchange], wait: str, tmp_path: Path
) -> None:
    """Within a piece of it, though its bound is far; as no Exception, which some boundary would tell the peers as a failure."""
    over = threading.Event()
    watch = Watchdog(storage_timeout_s=1.0, store_timeout_s=1.0, is_over=over.is_set)
    between = WatchedExchange(make(tmp_path), watch)
    threading.Timer(0.05, over.set).start()
    begun = time.monotonic()
    with pytest.raises(SessionLeft) as caught:
        getattr(between, wait)("never", Deadline.REPLY.s)
    assert time.monotonic() - begun < Deadline.REPLY.s / 2
    assert not isinstance(caught.value, Exception)
    assert watch.report() is None


def test_the_ranks_of_a_pod_that_is_missing_are_all_named() -> None:
    """Of three pods two posted: the error names every rank of the third, and no other; no key of ours lies outside the
    prefix."""
    keep, view = tcpstore.host("127.0.0.1", "pillion/run/session")
    pods = [[0, 3], [1, 4], [2, 5]]
    ends = [tcpstore.StoreExchange(view, keep, pods, first) for first in (0, 1, 2)]
    ends[0].post("p", {"from": 0})
    ends[1].post("p", {"from": 1})
    with pytest.raises(BarrierTimeout) as caught:
        ends[0].collect("p", 0.1)
    assert caught.value.missing == (2, 5)
    assert caught.value.waited_s >= 0.1
    ends[2].post("p", {"from": 2})
    assert ends[0].collect("p", 1.0) == {0: {"from": 0}, 1: {"from": 1}, 2: {"from": 2}}
    assert all(key.endswith("init/") or "pillion/run/session" in key for key in keep.list_keys())
    before = keep.num_keys()
    ends[0].publish("p", {})
    ends[0].forget(["p"])
    assert keep.num_keys() == before - 3


class CountingStore:
    """A store that counts the questions which it is asked, by name."""

    def __init__(self, store: store_client.Store) -> None:
        self._store = store
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self._store, name)


def test_a_commit_waits_in_the_store_and_does_not_poll() -> None:
    """However late a pod is, within a piece of the wait: one question to wait, and one for the documents of all pods."""
    keep, view = tcpstore.host("127.0.0.1", "pillion/test")
    pods = [[first] for first in range(64)]
    # Another client: in one, the coordinator's wait would keep the others from posting.
    seen = tcpstore.connect("127.0.0.1", keep.port, "pillion/test", timeout_s=Deadline.REPLY.s)
    peers = [tcpstore.StoreExchange(seen, None, pods, first) for first in range(1, 64)]
    counting = CountingStore(view)
    coordinator = tcpstore.StoreExchange(cast("store_client.Store", counting), keep, pods, 0)
    coordinator.post("result", {"from": 0})
    for peer in peers[1:]:
        peer.post("result", {})
    counting.asked.clear()
    late = threading.Timer(protocol.PIECE_S / 4, peers[0].post, ("result", {"late": True}))
    late.start()
    found = coordinator.collect("result", Deadline.REPLY.s)
    late.join()
    assert found[1] == {"late": True}
    assert counting.asked == {"wait": 1, "multi_get": 1}


def test_no_call_of_an_exchange_asks_the_store_once_for_each_pod() -> None:
    """Of 64 pods: to publish, to receive and to forget take one or two questions each, and nothing is left."""
    keep, view = tcpstore.host("127.0.0.1", "pillion/test")
    pods = [[first] for first in range(64)]
    for first in pods:
        tcpstore.StoreExchange(view, None, pods, first[0]).post("result", {})
    left = keep.num_keys() - len(pods)
    counting = CountingStore(view)
    coordinator = tcpstore.StoreExchange(cast("store_client.Store", counting), keep, pods, 0)
    coordinator.publish("result", {"outcome": 1})
    assert coordinator.receive("result", Deadline.REPLY.s) == {"outcome": 1}
    coordinator.forget(["result"])
    assert counting.asked == {"put": 1, "wait": 1, "multi_get": 1, "delete_keys": 2}
    assert keep.num_keys() == left


def test_documents_of_any_size_cross_the_store_and_leave_nothing_there() -> None:
    """
    A server of libuv drops a client that sets more than 8 MiB: the layout of 80,000 leaves has 13. What compresses badly goes in pieces,
    which are forgotten with their key, by whoever has read or written them.
    """
    keep, view = tcpstore.host("127.0.0.1", "pillion/test")
    other = tcpstore.connect("127.0.0.1", keep.port, "pillion/test")
    coordinator = tcpstore.StoreExchange(view, keep, [[0], [1]], 0)
    pod = tcpstore.StoreExchange(other, None, [[0], [1]], 1)
    empty = keep.num_keys()
    items = [{"fqn": f"model.layers.{number}.attention.wq.weight", "sizes": [8, number]} for number in range(120_000)]
    layout = {"layout": json.dumps(items)}
    assert len(protocol.encode(layout)) > 8 * 2**20
    pod.publish("layout/a", layout)
    noise = {"noise": random.Random(1).randbytes(9 * 2**19).hex()}
    pod.post("save/plan", noise)
    coordinator.post("save/plan", {"small": 1})
    assert coordinator.receive("layout/a", Deadline.REPLY.s) == layout
    assert coordinator.collect("save/plan", Deadline.REPLY.s) == {0: {"small": 1}, 1: noise}
    coordinator.publish("save/plan", noise)
    assert pod.receive("save/plan", Deadline.REPLY.s) == noise
    assert keep.num_keys() > empty + 4, "the noise is in pieces"
    coordinator.forget(["save/plan"])
    coordinator.unpublish(["layout/a"])
    assert keep.num_keys() == empty


def test_a_damaged_packed_document_is_an_error_and_no_document() -> None:
    """One that is cut, or no text of ours, is a ValueError; one that fits into no store is refused before the store drops us."""
    whole, pieces = tcpstore.pack({"text": "a" * tcpstore.PLAIN_BYTES})
    assert pieces == {}
    assert tcpstore.unpack(whole, []) == {"text": "a" * tcpstore.PLAIN_BYTES}
    for damaged in (whole[:-8], whole[:20], f"{tcpstore.PACKED}:!", f"{tcpstore.PACKED}:"):
        with pytest.raises(ValueError):
            tcpstore.unpack(damaged, [])


def test_a_stranger_in_our_prefix_is_an_error_and_no_document() -> None:
    """A value that is no JSON object is a ValueError."""
    for data in (b"[]", b"1", b"\xff", b""):
        with pytest.raises(ValueError):
            protocol.decode(data)


def test_a_store_that_is_not_there_is_an_error_at_the_bound() -> None:
    """Nobody listens: connect raises, and says so."""
    keep, _ = tcpstore.host("127.0.0.1", "x")
    port = keep.port
    del keep, _
    with pytest.raises(store_client.StoreGone):
        tcpstore.connect("127.0.0.1", port, "x", timeout_s=0.2)
