"""
Tests of the commit on an object store, in every order that the requests of two attempts can take.

The attempts run the product's own code against a bucket in memory, request by request. Each run may have one mishap: a request or its answer
is lost, a request is refused as if somebody else were there, or it is applied, answered by an error and repeated. A request that was lost may
still arrive, at any moment after its client gave it up. An attempt that dies is one that is not continued: what holds in every state holds
after every death. The first put of a new folder runs beside the look at its files. The look changes nothing, so that two orders stand for all: the
put before the look, and after it. What an attempt does is a function of the answers so far, so that each state is reached by running it again.

Called from: pytest.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest
from obstore.exceptions import AlreadyExistsError, GenericError

from pillion.errors import CommitError
from pillion.wire import names
from pillion.wire.object_store import ObjectStore
from pillion_sidecar.storage import object_client, object_requests, objects
from pillion_sidecar.storage.folder import nothing
from pillion_sidecar.storage.objects import TOMBSTONE, ObjectFolder
from storage_contract.documents import PUBLISHED, documents, generation_of
from support.object_stores.in_memory import InMemory, Objects, Stored

Act = Callable[[ObjectFolder], str]
STRANGERS: Final = b"the marker of another program, longer than any tombstone is"
MAX_REQUESTS: Final = 40
"""Maximum number of requests of one attempt: more are a loop that does not end."""


class Pending(BaseException):
    """An attempt has come to a request that is not answered yet."""

    def __init__(self, act: Callable[[], Any], conditional: bool) -> None:
        self.act = act
        self.conditional = conditional


@dataclass(frozen=True, slots=True)
class Attempt:
    """How far an attempt is: the answers that it had."""

    answers: tuple[tuple[str, Any], ...] = ()
    """(label, answer or error)."""
    outcome: str = ""
    """What it returned; empty: it goes on, or has died."""

    @property
    def key(self) -> tuple[object, ...]:
        return (*(label for label, _ in self.answers), self.outcome)


class Late(NamedTuple):
    """A request that its client gave up, and that may still arrive."""

    key: tuple[object, ...]
    """What tells it from others."""
    act: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class State:
    objects: tuple[tuple[str, Stored], ...]
    attempts: tuple[Attempt, ...]
    num_mishaps: int
    """How many may still come."""
    late: tuple[Late, ...] = ()
    newest_said: int = 0
    """Newest generation that has said "committed" so far."""

    @property
    def key(self) -> tuple[object, ...]:
        attempts = tuple(each.key for each in self.attempts)
        return self.objects, attempts, self.num_mishaps, tuple(each.key for each in self.late), self.newest_said

    @property
    def outcomes(self) -> tuple[str, ...]:
        return tuple(each.outcome for each in self.attempts)


def publishing(generation: str, *, is_new: bool = False) -> Act:
    """An attempt to commit. It looks for a checkpoint of another program, and for a newer session, before the checkpoint is visible."""

    def act(folder: ObjectFolder) -> str:
        def look() -> None:
            marker = names.COMMIT_MARKER in folder.files() and folder.read(names.COMMIT_MARKER)
            if marker == STRANGERS:
                raise CommitError("another program's")

        folder.publish(
            documents(generation),
            generation=generation,
            generation_of=generation_of,
            before=look if is_new else nothing,
            is_new=is_new,
        )
        return "committed"

    return act


def removing(by: int) -> Act:
    """A retention that takes the checkpoint down."""

    def act(folder: ObjectFolder) -> str:
        aside = folder.take_down(by=by, generation_of=generation_of, marker=names.COMMIT_MARKER)
        return "stays" if aside is None else "taken down"

    return act


def creating(data: bytes) -> Act:
    """A session that asks for a generation."""

    def act(folder: ObjectFolder) -> str:
        return "created" if folder.create("7", data) else "taken"

    return act


class Serial:
    """In the place of a pool with one thread: runs what it is given at once, or when its result is wanted."""

    def __init__(self, at_once: bool) -> None:
        self._at_once = at_once
        self._left: Callable[[], Any] | None = None

    def __call__(self, *_: object) -> "Serial":
        return Serial(self._at_once)

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An attempt that waits for an answer is run again later; one that failed has waited for what it began.
        if self._left is not None and (kind is None or issubclass(kind, Exception)):
            with contextlib.suppress(OSError):
                self._left()

    def submit(self, act: Callable[..., Any], *arguments: object) -> "futures.Future[Any]":
        call = functools.cache(functools.partial(act, *arguments))
        future: futures.Future[Any] = futures.Future()

        def result(timeout: float | None = None) -> Any:
            self._left = None
            return call()

        if self._at_once:
            try:
                call()
            except OSError as err:
                future.set_exception(err)
                return future
        else:
            self._left = call
        future.result = result  # type: ignore[method-assign]
        return future


class Attempts:
    """What the attempts do, over one bucket whose objects are put in and taken out between their requests."""

    def __init__(self, acts: Sequence[Act], monkeypatch: pytest.MonkeyPatch, *, put_first: bool = True) -> None:
        self.num = len(acts)
        self._acts = acts
        self._client = InMemory({})
        self._known: dict[tuple[object, ...], Pending | str] = {}
        monkeypatch.setattr(object_client, "documents", lambda *_: self._client)
        monkeypatch.setattr(object_client, "bulk", lambda *_: self._client)
        monkeypatch.setattr(object_requests, "PAUSE_FIRST_S", 0.0)
        monkeypatch.setattr(objects, "futures", SimpleNamespace(ThreadPoolExecutor=Serial(put_first)))
        self._folder = ObjectFolder.open("s3://bucket/step-1", ObjectStore(endpoint="http://127.0.0.1"))

    def drive(self, index: int, attempt: Attempt) -> Pending | str:
        """Return the request that comes next, or how the attempt ended: it is run over the answers that it had."""
        key = (index, attempt.key)
        if key not in self._known:
            self._known[key] = self._run(index, attempt)
        return self._known[key]

    def _run(self, index: int, attempt: Attempt) -> Pending | str:
        answers = iter(attempt.answers)

        def request(make: Callable[[], Any], conditional: bool) -> Any:
            for _, answer in answers:
                if isinstance(answer, Exception):
                    raise answer
                return answer
            assert len(attempt.answers) < MAX_REQUESTS, "it asks and asks"
            raise Pending(make, conditional)

        self._client.request = request
        try:
            return self._acts[index](self._folder)
        except Pending as pending:
            return pending
        except CommitError:
            return "fenced"
        except OSError:
            return "unknown"

    def answer(self, way: Callable[[], Any], objects: Objects) -> Any:
        """Return what becomes of a request for these objects, which it may change."""
        self._client.objects = objects
        return way()

    def after(self, index: int, attempt: Attempt, answer: Any) -> Attempt:
        following = replace(attempt, answers=(*attempt.answers, (label(answer), answer)))
        ended = self.drive(index, following)
        return following if isinstance(ended, Pending) else replace(following, outcome=ended)


def label(answer: Any) -> str:
    """What tells an answer from another one. The same object for the same text: states are compared by it, again and again."""
    if isinstance(answer, Exception):
        return sys.intern(f"{type(answer).__name__}: {answer}")
    return sys.intern(repr((answer.meta["e_tag"], answer.bytes()) if hasattr(answer, "meta") else answer))


def answered(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as err:
        return err


class Way(NamedTuple):
    """What can become of a request."""

    num_mishaps: int
    answer: Callable[[], Any]
    """Returns what its client sees."""
    is_late: bool = False


def ways(pending: Pending) -> Iterator[Way]:
    """What can become of a request."""

    def cut(act: Callable[[], Any] = lambda: None) -> Exception:
        answered(act)
        return GenericError("Generic S3 error: HTTP error: connection closed")

    def repeated() -> Any:
        answered(pending.act)
        return answered(pending.act)

    yield Way(0, lambda: answered(pending.act))
    # A reading that is lost is repeated by the client, and one that fails for good ends the attempt as a death does.
    if pending.conditional:
        yield Way(1, lambda: AlreadyExistsError("409 Conflict"))
        yield Way(1, repeated)
        yield Way(1, lambda: cut(pending.act))
        yield Way(1, cut)
        yield Way(1, cut, is_late=True)


def explore(attempts: Attempts, generations: Sequence[int], start: Objects) -> Iterator[State]:
    """Yield every state that can be reached, each once."""
    stack = [State(tuple(sorted(start.items())), (Attempt(),) * attempts.num, 1)]
    seen = {stack[0].key}
    while stack:
        state = stack.pop()
        yield state
        for reached in following(attempts, generations, state):
            if reached.key not in seen:
                seen.add(reached.key)
                stack.append(reached)


def following(attempts: Attempts, generations: Sequence[int], state: State) -> Iterator[State]:
    """Yield what one request more makes of a state."""
    for index, attempt in enumerate(state.attempts):
        if attempt.outcome:
            continue
        pending = attempts.drive(index, attempt)
        assert isinstance(pending, Pending), "an attempt ends with its last answer"
        for way in ways(pending):
            if way.num_mishaps > state.num_mishaps:
                continue
            objects = dict(state.objects)
            after = attempts.after(index, attempt, attempts.answer(way.answer, objects))
            said = state.newest_said
            if after.outcome == "committed":
                assert generations[index] >= said, "an older attempt said that it committed after a newer one had"
                said = generations[index]
            yield State(
                tuple(sorted(objects.items())),
                (*state.attempts[:index], after, *state.attempts[index + 1 :]),
                state.num_mishaps - way.num_mishaps,
                (*state.late, *([Late((index, attempt.key), pending.act)] if way.is_late else [])),
                said,
            )
    for late in state.late:
        objects = dict(state.objects)
        attempts.answer(functools.partial(answered, late.act), objects)
        others = tuple(each for each in state.late if each is not late)
        yield replace(state, objects=tuple(sorted(objects.items())), late=others)


def order(state: State, name: str) -> int:
    """The generation of a published document; 0: it is not there."""
    stored = dict(state.objects).get(f"step-1/{name}")
    return int(generation_of(stored.data) or 0) if stored is not None else 0


def written(generation: str) -> Objects:
    return {f"step-1/{each.name}": Stored(each.data, 1) for each in documents(generation)}


STARTS: Final = {
    "nothing": dict[str, Stored](),
    "a commit": written("4"),
    "a manifest": dict([*written("4").items()][:1]),
    "a tombstone": written("4") | {f"step-1/{names.COMMIT_MARKER}": Stored(TOMBSTONE, 2)},
}


@pytest.mark.parametrize("start", STARTS)
def test_no_order_of_requests_lets_an_older_attempt_win(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was told "committed" last stands whole, or a newer one's documents do; no older one says so after a newer one."""
    num_states = 0
    outcomes = set()
    for state in explore(Attempts([publishing("5"), publishing("6")], monkeypatch), [5, 6], STARTS[start]):
        num_states += 1
        manifest, marker = (order(state, name) for name in PUBLISHED)
        # The manifest comes first: what it names is there, and `finish` mends a marker that is older.
        assert manifest >= marker
        assert min(manifest, marker) >= state.newest_said
        assert state.outcomes[1] in ("", "committed"), "nobody is newer, and one mishap is no reason to give up"
        outcomes.add(state.outcomes)
    assert num_states > 1000
    assert {("committed", "committed"), ("fenced", "committed"), ("", "committed"), ("committed", "")} <= outcomes


@pytest.mark.parametrize("put_first", [True, False])
@pytest.mark.parametrize("start", [*STARTS, "a stranger's"])
def test_a_put_beside_the_look_lets_no_older_attempt_win_and_takes_no_strangers_checkpoint(
    start: str, put_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds where both took the folder for new, although a commit, a half or another program's checkpoint had come meanwhile."""
    there = STARTS.get(start, {f"step-1/{names.COMMIT_MARKER}": Stored(STRANGERS, 1)})
    acts = [publishing("5", is_new=True), publishing("6", is_new=True)]
    outcomes = set()
    for state in explore(Attempts(acts, monkeypatch, put_first=put_first), [5, 6], there):
        outcomes.add(state.outcomes)
        if start == "a stranger's":
            assert dict(state.objects)[f"step-1/{names.COMMIT_MARKER}"].data == STRANGERS
            assert not {"committed", "unknown"} & set(state.outcomes)
            continue
        manifest, marker = (order(state, name) for name in PUBLISHED)
        assert manifest >= marker
        assert min(manifest, marker) >= state.newest_said
        assert state.outcomes[1] in ("", "committed"), "nobody is newer, and one mishap is no reason to give up"
    if start == "a stranger's":
        assert ("fenced", "fenced") in outcomes
    else:
        assert {("committed", "committed"), ("fenced", "committed"), ("", "committed"), ("committed", "")} <= outcomes


def test_a_removal_never_takes_what_a_newer_attempt_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a retention of an older session a commit stands, in whatever order their requests come."""
    ends = set()
    for state in explore(Attempts([removing(by=5), publishing("6")], monkeypatch), [0, 6], written("4")):
        if state.outcomes[1] == "committed":
            assert order(state, names.COMMIT_MARKER) == 6
        data = dict(state.objects)[f"step-1/{names.COMMIT_MARKER}"].data
        ends.add((*state.outcomes, "tombstone" if data == TOMBSTONE else generation_of(data)))
    assert ("taken down", "committed", "6") in ends
    assert ("stays", "committed", "6") in ends
    assert ("taken down", "", "tombstone") in ends


def test_one_of_two_sessions_gets_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never both; and one does unless it dies, whatever became of a request."""
    ends = set()
    for state in explore(Attempts([creating(b"one"), creating(b"two")], monkeypatch), [0, 0], {}):
        assert state.outcomes.count("created") <= 1
        assert not all(state.outcomes) or "created" in state.outcomes
        ends.add(state.outcomes)
    assert {("created", "taken"), ("taken", "created"), ("", "created"), ("", "taken")} <= ends
