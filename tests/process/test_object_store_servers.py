"""
The whole of: what the tests rely on in the servers of object stores, the fake among them: all pass the same suite.

Called from: pytest.
Must never: prove what no test needs.
"""

import os
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from cluster.harness.limits import CACHE_VARIABLE
from cluster.harness.machine import HarnessError
from support.deadlines import Deadline
from support.object_stores import programs
from support.object_stores.fake_gcs import FakeGcs
from support.object_stores.places import Client, Place
from support.object_stores.servers import serve

RACERS = 4
NPM = """#!/bin/sh
echo "$*" >> "$ASKED"
[ -n "$REFUSED" ] && exit 1
mkdir -p node_modules/azurite/dist/src/blob && touch node_modules/azurite/dist/src/blob/main.js
"""
GO = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo built > "$2"
"""


def version(written: Any) -> Any:
    """By what to replace exactly that object."""
    return {name: written[name] for name in ("e_tag", "version") if written[name] is not None}


def race(work: Callable[[int, threading.Barrier], object]) -> list[int]:
    """Numbers of those whose work raised nothing, all of them begun at once."""
    barrier = threading.Barrier(RACERS, timeout=Deadline.REPLY.s)
    with futures.ThreadPoolExecutor(RACERS) as pool:
        done = [pool.submit(work, number, barrier) for number in range(RACERS)]
        errors = [each.exception(Deadline.SETTLE.s) for each in done]
    assert all(error is None or isinstance(error, AlreadyExistsError | PreconditionError) for error in errors), errors
    return [number for number, error in enumerate(errors) if error is None]


def test_one_of_many_creates_wins(bucket: Place) -> None:
    """If-None-Match holds under concurrency: one wins, and its bytes are there."""
    clients = [bucket.client() for _ in range(RACERS)]
    for key in ("1", "2", "3"):

        def create(number: int, barrier: threading.Barrier, key: str = key) -> None:
            barrier.wait()
            clients[number].put(key, b"%d" % number, mode="create")

        (winner,) = race(create)
        assert bytes(clients[0].get(key).bytes()) == b"%d" % winner


def test_one_of_many_swaps_wins(bucket: Place) -> None:
    """If-Match holds under concurrency: of several that replace one version one does."""
    clients = [bucket.client() for _ in range(RACERS)]
    there = version(clients[0].put("key", b"first"))
    for round_number in range(3):

        def swap(number: int, barrier: threading.Barrier, there: Any = there, text: str = f"{round_number}") -> None:
            barrier.wait()
            clients[number].put("key", f"{text} of {number}".encode(), mode=there)

        (winner,) = race(swap)
        answer = clients[0].get("key")
        assert bytes(answer.bytes()) == f"{round_number} of {winner}".encode()
        there = version(answer.meta)


def test_a_version_that_is_gone_is_not_replaced(bucket: Place) -> None:
    """Neither when another one is there, nor when none is."""
    client = bucket.client()
    old = version(client.put("key", b"old"))
    client.put("key", b"newer", mode=old)
    with pytest.raises(PreconditionError):
        client.put("key", b"newest", mode=old)
    client.delete("key")
    with pytest.raises((BaseError, FileNotFoundError)):
        client.put("key", b"newest", mode=old)
    assert client.list().collect() == []


def test_a_bucket_that_is_not_there_is_no_empty_one(bucket: Place) -> None:
    """404 says "no bucket" as it says "no object"; a listing is an error."""
    client = Place(
        kind=bucket.kind, port=bucket.port, bucket="none", account=bucket.account, secret=bucket.secret
    ).client()
    with pytest.raises(FileNotFoundError):
        client.get("key")
    with pytest.raises(FileNotFoundError):
        client.put("key", b"data")
    with pytest.raises((BaseError, FileNotFoundError)):
        client.list_with_delimiter()


def test_the_credentials_are_checked(s3_bucket: Place) -> None:
    """Another secret is refused."""
    wrong = Place(kind="s3", port=s3_bucket.port, bucket=s3_bucket.bucket, account=s3_bucket.account, secret="another")
    with pytest.raises(BaseError):
        wrong.client().list_with_delimiter()


def test_deletions_of_what_is_not_there(bucket: Place) -> None:
    """S3 takes them; Azure and GCS raise, one by one and in a batch."""
    client = bucket.client()
    client.put("there", b"data")
    if bucket.kind == "s3":
        client.delete("none")
        client.delete(["there", "none"])
    else:
        with pytest.raises(FileNotFoundError):
            client.delete("none")
        with pytest.raises(FileNotFoundError):
            client.delete(["there", "none"])
    assert client.list().collect() == []


def test_a_listing_of_many_pages_is_whole() -> None:
    """The fake pages as the real one does, through folders too."""
    with FakeGcs(page=2) as fake:
        fake.make_bucket("pages")
        client = Place(kind="gcs", port=fake.port, bucket="pages", account="", secret="").client()
        keys = ["a/1", "a/2", "a&b", "b/1", "c", "d", "e/1"]
        for key in keys:
            client.put(key, key.encode())
        assert sorted(each["path"] for each in client.list().collect()) == sorted(keys)
        listed = client.list_with_delimiter()
        assert listed["common_prefixes"] == ["a", "b", "e"]
        assert sorted(each["path"] for each in listed["objects"]) == ["a&b", "c", "d"]
        assert [each["path"] for each in client.list_with_delimiter("a")["objects"]] == ["a/1", "a/2"]
        assert [each["path"] for each in client.list(offset="c").collect()] == ["d", "e/1"]


def test_a_copy_is_made_in_the_store(bucket: Place) -> None:
    """Without its bytes going by way of the client."""
    client: Client = bucket.client()
    client.put("from", b"data")
    client.copy("from", "a/to")
    assert bytes(client.get("a/to").bytes()) == b"data"


def test_a_server_ends_with_its_test(tmp_path: Path) -> None:
    """Nobody answers at its port any more."""
    with serve("s3", tmp_path) as server:
        client = server.make_bucket().client(timeout_s=Deadline.REPLY.s, max_retries=0)
        client.put("key", b"data")
    with pytest.raises(BaseError):
        client.get("key")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What npm was asked, in a world with an empty cache."""
    for name, text in {"npm": NPM, "go": GO}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    # uv has no fake here, and a test asks no registry.
    monkeypatch.setattr(programs, "_make_s3fs", lambda: None)
    return tmp_path / "asked"


def test_the_programs_are_made_once(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What npm refuses leaves nothing; the next try installs it, runs no script of a package, and is the last."""
    monkeypatch.setenv("REFUSED", "yes")
    with pytest.raises(HarnessError, match="npm"):
        programs.make()
    cache = programs.versitygw().parents[1]
    assert [path.name for path in cache.iterdir()] == [programs.versitygw().parent.name]
    monkeypatch.setenv("REFUSED", "")
    programs.make()
    programs.make()
    assert asked.read_text().splitlines() == ["ci --ignore-scripts --no-audit --no-fund"] * 2
    assert programs.azurite().exists()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("program", [programs.versitygw, programs.azurite])
def test_a_test_without_its_program_is_skipped_and_in_ci_fails(
    program: Callable[[], Path], asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason names the command that makes it. Nothing is built within a test."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make object-stores"):
        program()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="make object-stores"):
        program()
    assert not asked.exists()
