"""
Pillion's own client of torch's TCPStore: the same claims for it and for torch's client, over real stores of both of torch's servers; and how it ends.

Called from: pytest.
Must never: use a store that is no TCPStore, but where a broken one is the case.
"""

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from pillion_sidecar.executor.exchange import store_client, tcpstore, torch_store
from pillion_sidecar.executor.exchange.store_client import NotUnderstood, Store, StoreClient, StoreGone, StoreTimeout
from support.deadlines import Deadline

PREFIX = "pillion/run/session"


@pytest.fixture(params=["libuv", "threads"])
def server(request: pytest.FixtureRequest) -> dist.TCPStore:
    """A store of each of torch's two servers."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=request.param == "libuv")


@pytest.fixture
def client(server: dist.TCPStore) -> Iterator[StoreClient]:
    """Pillion's client of it."""
    made = StoreClient.connect("127.0.0.1", server.port, PREFIX, timeout_s=Deadline.REPLY.s)
    yield made
    made.close()


def torchs(server: dist.TCPStore) -> Store:
    """torch's client of it."""
    return torch_store.connect("127.0.0.1", server.port, PREFIX, timeout_s=Deadline.REPLY.s)


def test_each_client_reads_what_the_other_writes(server: dist.TCPStore, client: StoreClient) -> None:
    """Values, numbers and keys are the same ones, in both directions, for any text."""
    other = torchs(server)
    for writer, reader in ((client, other), (other, client)):
        for key, value in (("plain", "x"), ("empty", ""), ("phase/0/\u00e9", "\u00fc" * 70_000)):
            writer.set(key, value)
            reader.wait([key], Deadline.REPLY.s)
            assert reader.get(key) == value.encode()
            assert reader.check([key])
        assert reader.multi_get(["plain", "empty"]) == [b"x", b""]
        assert writer.add("number", 3) == 3
        assert reader.add("number", -1) == 2
        assert reader.delete_key("number")
        assert not writer.delete_key("number")
        assert not writer.check(["plain", "number"])


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_many_keys_are_put_and_deleted_and_each_answer_is_read(
    server: dist.TCPStore, client: StoreClient, kind: str
) -> None:
    """More keys than are asked for ahead, among them some that are not there: none is left, and the next answer belongs to the next question."""
    store: Store = client if kind == "ours" else torchs(server)
    keys = [f"phase/{number}" for number in range(store_client.MAX_AHEAD * 2 + 7)]
    for key in keys[::2]:
        store.put(key, "\u00fc" * 300)
    assert store.multi_get(keys[::2]) == [("\u00fc" * 300).encode()] * len(keys[::2])
    before = server.num_keys()
    store.delete_keys(keys)
    store.delete_keys([])
    assert server.num_keys() == before - len(keys[::2])
    assert store.add("number", 5) == 5


def test_what_is_put_is_there_for_others_at_once(server: dist.TCPStore, client: StoreClient) -> None:
    """Without a further request of the writer, in 100 tries."""
    other = torchs(server)
    for number in range(100):
        client.put(f"put-{number}", "x")
        assert other.check([f"put-{number}"])


def test_no_key_lies_outside_the_prefix_and_none_is_left_of_the_greeting(
    server: dist.TCPStore, client: StoreClient
) -> None:
    """The job's own keys are nobody else's business."""
    before = server.num_keys()
    client.set("mine", "x")
    client.check(["mine"])
    assert server.num_keys() == before + 1
    assert bytes(dist.PrefixStore(PREFIX, server).get("mine")) == b"x"


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_a_wait_ends_with_the_key_or_at_its_bound(server: dist.TCPStore, client: StoreClient, kind: str) -> None:
    """Both clients; after a wait that ended at its bound the connection is as good as before."""
    store: Store = client if kind == "ours" else torchs(server)
    for _ in range(3):
        with pytest.raises(StoreTimeout):
            store.wait(["late", "never"], 0.01)
    timer = threading.Timer(0.05, server.set, (f"{PREFIX}/late", "here"))
    timer.start()
    store.wait(["late"], Deadline.REPLY.s)
    timer.join()
    assert store.get("late") == b"here"


def test_a_key_that_comes_while_its_wait_is_cancelled_loses_no_answer(
    server: dist.TCPStore, client: StoreClient
) -> None:
    """Keys that come at the very end of a wait: it may end either way, and the next answer belongs to the next question."""
    for number in range(60):
        key = f"race-{number}"
        timer = threading.Timer(0.002, server.set, (f"{PREFIX}/{key}", str(number)))
        timer.start()
        with contextlib.suppress(StoreTimeout):
            client.wait([key], 0.002)
        timer.join()
        assert client.get(key) == str(number).encode()
        assert client.add("count", 1) == number + 1


def test_threads_share_one_client(client: StoreClient) -> None:
    """Each answer goes to the thread that asked."""

    def count() -> None:
        for _ in range(100):
            client.add("shared", 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(Deadline.REPLY.s)
    assert client.add("shared", 0) == 400


def test_a_store_that_is_gone_is_gone_for_every_later_call() -> None:
    """The first call says so, and the next ones do not wait."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = StoreClient.connect("127.0.0.1", server.port, PREFIX, timeout_s=Deadline.REPLY.s)
    try:
        del server
        for _ in range(2):
            with pytest.raises(StoreGone, match="gone"):
                client.wait(["key"], Deadline.REPLY.s)
    finally:
        client.close()


@contextlib.contextmanager
def stranger(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something else at the store's port, which does this with one connection after the other. Gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        # Closing alone does not wake a thread that accepts.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(Deadline.REPLY.s)


def _say_other(connection: socket.socket) -> None:
    connection.recv(64)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20)
    connection.recv(4096)


@pytest.mark.parametrize("answer", [_say_other, lambda connection: None], ids=["other words", "hangs up"])
def test_what_is_no_store_is_named_so(answer: Callable[[socket.socket], None]) -> None:
    """Neither is taken for a store that has no keys."""
    with stranger(answer) as port, pytest.raises(NotUnderstood):
        StoreClient.connect("127.0.0.1", port, PREFIX, timeout_s=Deadline.REPLY.s)


def test_a_store_that_accepts_and_says_nothing_ends_at_the_bound() -> None:
    """As one whose process is stopped: the kernel still accepts. torch's own client would wait without a bound."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        begun = time.monotonic()
        with pytest.raises(StoreGone):
            StoreClient.connect("127.0.0.1", listener.getsockname()[1], PREFIX, timeout_s=0.2)
        assert time.monotonic() - begun < Deadline.REPLY.s


def test_a_store_that_answers_otherwise_is_left_to_torchs_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A release that does not take our first word: the exchange works on, by torch, and the log says what that costs."""
    monkeypatch.setattr(store_client, "MAGIC", 1)
    # The server that hangs up on a stranger. The other one says nothing to it, and the connection ends at its bound.
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
    store = tcpstore.connect("127.0.0.1", server.port, PREFIX, timeout_s=Deadline.REPLY.s)
    assert isinstance(store, torch_store.TorchStore)
    between = tcpstore.StoreExchange(store, None, [[0]], 0)
    between.post("phase", {"n": 1})
    assert between.collect("phase", 1.0) == {0: {"n": 1}}
    assert "300 MB" in caplog.text


def test_torchs_timeout_is_what_the_other_clients_is(server: dist.TCPStore) -> None:
    """One kind of error for both, whatever torch calls it."""
    store = torchs(server)
    begun = time.monotonic()
    with pytest.raises(StoreTimeout):
        store.wait(["never"], datetime.timedelta(milliseconds=20).total_seconds())
    assert time.monotonic() - begun < Deadline.REPLY.s
