"""
The whole of: that each message has a line of documentation, somebody who sends it and somebody who takes it.

Called from: pytest.
Must never: list messages by hand; the modules have them.
"""

import ast
import functools
import importlib
import inspect
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from pillion.wire import control, events
from pillion.wire.message import Message, Request
from pillion_sidecar import channel, settings
from pillion_sidecar.executor.worker import Worker
from pillion_sidecar.supervisor.dispatcher import Supervisor
from pillion_sidecar.supervisor.signals import SIGNALS

ROOT: Final = Path(__file__).parents[3]
SOURCES: Final = (ROOT / "client" / "src", ROOT / "sidecar" / "src")
MODULES: Final = (
    "pillion.wire.control",
    "pillion.wire.save_messages",
    "pillion.wire.load_messages",
    "pillion.wire.events",
    "pillion_sidecar.supervisor.signals",
    "pillion_sidecar.channel",
)
ASKED_BY_HAND: Final = {control.ReadStatus}
"""Whoever looks after a sidecar asks it over the socket; no program of ours does."""


def messages_of(module: str) -> Iterator[type[Message]]:
    for each in vars(importlib.import_module(module)).values():
        # A class without a type is what others are derived from.
        if isinstance(each, type) and issubclass(each, Message) and each.__module__ == module and hasattr(each, "type"):
            yield each


KINDS: Final = [kind for module in MODULES for kind in messages_of(module)]


@functools.cache
def uses() -> tuple[frozenset[str], frozenset[str]]:
    """Full names of what the sources call, and of what they have as a key of a table or pass to a call."""
    called: set[str] = set()
    named: set[str] = set()
    for path in sorted(each for source in SOURCES for each in source.rglob("*.py")):
        tree = ast.parse(path.read_text())
        imported = {
            name.asname or name.name: f"{each.module}.{name.name}"
            for each in ast.walk(tree)
            if isinstance(each, ast.ImportFrom)
            for name in each.names
        }

        def full(node: ast.AST | None, imported: dict[str, str] = imported) -> str:
            if isinstance(node, ast.Attribute):
                return f"{full(node.value)}.{node.attr}"
            return imported.get(node.id, node.id) if isinstance(node, ast.Name) else ""

        for each in ast.walk(tree):
            if isinstance(each, ast.Call):
                called.add(full(each.func))
                named.update(full(argument) for argument in each.args)
            elif isinstance(each, ast.Dict):
                named.update(full(key) for key in each.keys)
    return frozenset(called), frozenset(named)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
def test_each_message_is_described_sent_and_taken(kind: type[Message]) -> None:
    """One without a sender says what nobody says; one without a taker is passed over in silence, like that of a newer release."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    called, named = uses()
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    assert ast.get_docstring(node)
    assert name in called or kind in ASKED_BY_HAND, f"nobody sends {name}"
    answers = {each for asked in KINDS if issubclass(asked, Request) for each in asked.answers().values()}
    assert name in named or kind in answers, f"nobody takes {name}"


def test_each_receiver_has_a_handler_for_each_message_that_it_reads(tmp_path: Path) -> None:
    """The types that are read and the handlers that are called are two tables, and a message in one of them alone would be a failure."""
    supervisor = Supervisor(settings.from_arguments(["--runtime-dir", str(tmp_path)], {}))
    assert set(supervisor._on_trainer_message) == set(control.TRAINERS.values())
    assert set(supervisor._on_observer_message) == set(control.OBSERVED.values())
    assert set(supervisor._on_executor_event) == set(channel.EVENTS.values())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        executor = Worker(theirs)
    assert not executor._at_once.keys() & executor._operations.keys()
    assert executor._at_once.keys() | executor._operations.keys() == set(channel.REQUESTS.values())


def test_what_trainers_hear_from_other_pods_are_their_events() -> None:
    """Whatever of the job's signals a sidecar does not take itself goes on to its trainers as it came."""
    supervisor = Supervisor(settings.from_arguments(["--runtime-dir", "/nowhere"], {}))
    passed_on = set(SIGNALS.values()) - set(supervisor.trainers._on_signal)
    assert passed_on <= set(events.EVENTS.values())
