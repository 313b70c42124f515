"""
The whole of: what a save changes of the interpreter while it holds training up.

Called from: pytest.
"""

import gc
import sys
import threading

from pillion import saving
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
