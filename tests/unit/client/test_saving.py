"""
The whole of: what a save changes of the interpreter while it holds training up, and a save on top of another one.

Called from: pytest.
"""

import gc
import sys
import threading
import types
from typing import Any, cast

import pytest

from pillion import saving
from pillion.errors import StagingError
from pillion.handle import SaveHandle
from support.deadlines import Deadline


def test_two_threads_that_save_leave_the_interpreter_as_it_was() -> None:
    """The last one to leave puts the settings back that the first one changed."""
    before = sys.getswitchinterval(), gc.isenabled()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with saving._hurry():
            inside.set()
            leave.wait(Deadline.REPLY.s)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(Deadline.REPLY.s)
    with saving._hurry():
        leave.set()
        thread.join(Deadline.REPLY.s)
        assert not gc.isenabled()
    assert (sys.getswitchinterval(), gc.isenabled()) == before


def test_a_signal_s_handler_that_saves_within_a_save_fails_at_once_and_holds_nothing_up() -> None:
    """The save beneath holds the slot that it would wait for, and cannot go on; a handler that ends the process gives that slot up."""
    inner: list[SaveHandle] = []
    abandoned: list[int] = []

    def claim(*_: object, **__: object) -> None:
        inner.append(saver.save({}, 2, persist=True, overlap=False))
        raise SystemExit(0)

    session = types.SimpleNamespace(
        mapping=object(), claim=claim, track=id, forget=id, abandon=lambda step, *_, **__: abandoned.append(step)
    )
    saver = saving.Saver(cast("Any", session), overlaps=False)
    with pytest.raises(SystemExit):
        saver.save({}, 1, persist=True, overlap=False)
    assert isinstance(inner[0].error(), StagingError)
    assert "signal" in str(inner[0].error())
    assert abandoned == [1]
