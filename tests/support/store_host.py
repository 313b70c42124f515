"""
The whole of: a job's store in a process of its own, so that a test can end it or stop it.

Called from: tests of the level distributed.
Must never: outlive its test.
"""

import contextlib
import os
import signal
import warnings
from multiprocessing import Pipe
from typing import Final, final

import torch.distributed as dist

from support import deadlines, network
from support.deadlines import Deadline

_STATUS: Final = 0


@final
class StoreHost:
    """
    A forked child that hosts a TCPStore on a free port of the loopback, or of a network that the test made.
    """

    def __init__(self, made: network.Network | None = None) -> None:
        self.host = made.store_address if made else "127.0.0.1"
        ours, theirs = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                ours.close()
                if made:
                    network.enter(made.store)
                store = dist.TCPStore(self.host, 0, is_master=True, wait_for_workers=False, use_libuv=False)
                theirs.send(store.port)
                # Until the test ends, or ends this.
                theirs.recv()
            os._exit(_STATUS)
        theirs.close()
        self._pipe = ours
        self._reaped = False
        assert ours.poll(Deadline.PROCESS_START.s), "the store's process says its port"
        self.port: int = ours.recv()

    def stop(self) -> None:
        """
        It takes questions from now on, and answers none.
        """
        os.kill(self.pid, signal.SIGSTOP)

    def end(self) -> None:
        """
        Ends it. Blocks: up to Deadline.PROCESS_EXIT.
        """
        if self._reaped:
            return
        os.kill(self.pid, signal.SIGKILL)
        deadlines.eventually(
            lambda: os.waitpid(self.pid, os.WNOHANG)[0] == self.pid, Deadline.PROCESS_EXIT, "the store's process ended"
        )
        self._reaped = True
        self._pipe.close()
