"""
The whole of: how long a test waits, and for what.

Called from: every test and fixture that waits for another process, thread or file.
Must never: be by-passed with a bare sleep; a wait that is not in this table has no bound that anyone chose.
"""

import asyncio
import enum
import os
import time
from collections.abc import Callable
from typing import TypeVar, final

T = TypeVar("T")

SCALE_VARIABLE = "PILLION_TEST_DEADLINE_SCALE"
"""Multiplies every deadline; 3 on a machine that is three times as slow. Read when a deadline is used."""

_POLL_FIRST_S = 0.002
_POLL_MAX_S = 0.05


@final
class Deadline(enum.Enum):
    """
    One row for each kind of wait: seconds on a quiet machine with two cores, and why that many.
    """

    REPLY = (10.0, "a live process answers one message on a local socket")
    SETTLE = (10.0, "what a test stopped is gone: processes reaped, files unlinked, descriptors closed")
    PROCESS_START = (30.0, "an interpreter that does not import torch starts and says so")
    PROCESS_EXIT = (20.0, "a process that was asked to end has ended")
    ENDED_AT_ONCE = (
        5.0,
        "a sidecar with nothing left to do ends when it is told to; under a second on a quiet machine",
    )
    TORCH_START = (90.0, "an interpreter that imports torch starts, several at once on two cores")
    INSTALLED = (300.0, "pip has fetched and installed what two wheels require, beside a torch that is there")
    STAGED = (30.0, "a save's bytes are in the arena")
    COMMITTED = (60.0, "a save of a few MiB is durable and visible")
    LOADED = (60.0, "a checkpoint of a few MiB is back in the state dict")
    DRAINED = (60.0, "a sidecar has persisted its newest snapshot and ended")
    LINGERED = (
        200.0,
        "a sidecar whose trainers died has kept their snapshots for 120 s, persisted the newest, and ended",
    )
    SCRIPT = (120.0, "a training script of a few dozen steps has ended")
    TORCHRUN = (170.0, "the same under torchrun, with one restart; below the wall of pytest's own timeout")
    API = (20.0, "a controller of the cluster has noticed a change and written its answer")
    POD_STARTED = (
        120.0,
        "pods are scheduled, their images there, and their containers run; several at once on two cores",
    )
    POD_GONE = (90.0, "a pod has used its grace period, and its object is removed")
    TRAINED = (180.0, "a trainer in a pod imports torch, joins its peers and makes some dozens of steps")
    RECOVERED = (180.0, "a crashed or replaced trainer has started again and loaded")
    HOME = (20.0, "what a sidecar reports has reached an object's status, or a policy its job: a few reports")
    REFUSED = (60.0, "a save that storage refuses was tried again for 20 s (`RETRY_AFTER_S`), and its end was told")
    ROLLED_OUT = (150.0, "the operator's Deployments are available after an install or a change")
    OWNERS_READY = (
        300.0,
        "another project's controller serves: its pod has started, and a kubelet has brought it the certificate that it made",
    )
    RETRIED = (400.0, "a launcher has taken a whole job down, made it again, and it has loaded: two starts of Ray, say")
    NODE_LOST = (120.0, "the control plane has noticed that a node is gone, and moved on")

    def __init__(self, quiet_s: float, reason: str) -> None:
        self.quiet_s = quiet_s
        self.reason = reason

    @property
    def s(self) -> float:
        """
        Seconds to wait, scaled for this machine.

        Raises:
          ValueError: the scale is not a positive number.
        """
        text = os.environ.get(SCALE_VARIABLE, "1")
        scale = float(text)
        if not scale > 0:
            raise ValueError(f"{SCALE_VARIABLE}={text!r} is not a positive number")
        return self.quiet_s * scale


@final
class DeadlinePassed(AssertionError):
    """
    What was waited for did not come. Its message says what, how long, and what was seen last.
    """


def eventually(predicate: Callable[[], T], deadline: Deadline, what: str) -> T:
    """
    Polls `predicate` until it returns something true, and returns that.

    An AssertionError from the predicate counts as "not yet", so that a plain assertion can be polled; its text goes into
    the message at the end. Any other exception is the test's failure at once.

    Blocks: up to deadline.s, and one call of the predicate more.

    Raises:
      DeadlinePassed: it never was true.
    """
    begun = time.monotonic()
    pause_s = _POLL_FIRST_S
    while True:
        value, seen = _look(predicate)
        if value:
            return value
        _check(begun, deadline, what, seen)
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, _POLL_MAX_S)


async def soon(predicate: Callable[[], T], deadline: Deadline, what: str) -> T:
    """
    The same for a test that runs in an event loop: what is waited for goes on meanwhile.

    Raises:
      DeadlinePassed: it never was true.
    """
    begun = time.monotonic()
    pause_s = _POLL_FIRST_S
    while True:
        value, seen = _look(predicate)
        if value:
            return value
        _check(begun, deadline, what, seen)
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _POLL_MAX_S)


def _look(predicate: Callable[[], T]) -> tuple[T | None, object]:
    try:
        value = predicate()
    except AssertionError as err:
        return None, err
    return value, value


def _check(begun: float, deadline: Deadline, what: str, seen: object) -> None:
    waited_s = time.monotonic() - begun
    if waited_s >= deadline.s:
        raise DeadlinePassed(
            f"waited {waited_s:.1f} s for: {what} ({deadline.name}: {deadline.reason}); last seen: {seen!r}"
        )
