"""
The whole of: how a trainer ends whose pod is deleted, and which trainers are left to themselves.

Called from: pytest.
Must never: end this interpreter.
"""

import signal
from pathlib import Path
from typing import Final

import pytest

from pillion import stopping
from process.injected import Injected
from process.ranks import Ranks, committed
from support import deadlines
from support.deadlines import Deadline
from support.processes import Processes

SCRIPT: Final = """
import atexit, os, signal, sys, threading
from pillion import stopping

mode = sys.argv[1]
stopping.END_BOUND_S = 0.2
atexit.register(print, "atexit")
said, begins, ends, main = [], threading.Event(), threading.Event(), threading.get_native_id()
hears, _ = os.pipe()

def is_in_the_kernel():
    with open(f"/proc/self/task/{main}/syscall") as file:
        return file.read().split()[1:2] == [hex(hears)]

def listen():
    begins.wait()
    while mode == "hangs" and not is_in_the_kernel():
        pass
    said.append(stopping.stop())
    ends.set()

if mode == "handles":
    signal.signal(signal.SIGTERM, lambda *_: None)
threading.Thread(target=listen).start()
while mode == "has no handler":
    begins.set()
try:
    begins.set()
    if mode == "hangs":
        os.read(hears, 1)
    while mode == "swallows":
        try:
            threading.Event().wait(0.01)
        except BaseException:
            pass
    while mode == "trains":
        pass
    ends.wait()
finally:
    print("finally")
print("goes on", said)
"""

LAUNCHER: Final = """
import os, threading
import torch
import pillion

def train():
    checkpointer, pause = pillion.Checkpointer(), threading.Event()
    start = checkpointer.load({"w": torch.zeros(4)}) or 0
    for step in range(start + 1, 10**9):
        w = torch.full((4,), float(step))
        if checkpointer.due(step):
            checkpointer.save({"w": w}, step)
        if step == start + 100:
            print("trains", flush=True)
        pause.wait(0.001)

for attempt in (1, 2):
    trainer = os.fork()
    if not trainer:
        train()
    _, status = os.waitpid(trainer, 0)
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
"""
"""It starts its trainer once more, whatever it ended with; one import of torch serves both."""


@pytest.mark.parametrize(
    ("mode", "status", "said"),
    [
        ("trains", 143, ["finally", "atexit"]),
        ("has no handler", 143, ["atexit"]),
        ("hangs", 143, []),
        ("swallows", 143, None),
        ("handles", 0, ["finally", "goes on [False]", "atexit"]),
    ],
    ids=["trains", "trains without any handler", "hears nothing", "catches everything", "has a handler of its own"],
)
def test_a_trainer_without_a_handler_ends_with_143_and_one_with_a_handler_goes_on(
    processes: Processes, mode: str, status: int, said: list[str] | None
) -> None:
    """What stands in `finally` and at exit runs; a main thread that hears nothing is ended at a bound. Whoever handles SIGTERM decides."""
    run = processes.python("-c", SCRIPT, mode)
    assert run.wait(Deadline.PROCESS_START) == status, run.tail()
    # Between two tries of a loop that catches everything nothing is caught.
    assert said is None or run.stdout.splitlines() == said
    assert ("drain.endTrainer" in run.tail()) == (status == stopping.EXIT_TERMINATED)


def test_a_pod_that_is_deleted_ends_its_trainer_once_the_last_save_is_committed(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """
    After preStop, and without any signal, the trainer saves once more and ends with 143; one that a launcher starts again in the same pod
    ends as well, before it trains. Then the sidecar's SIGTERM finds nothing lost: status 0.
    """
    policy = {"trigger": {"periodSteps": 10**9, "snapshotSteps": 10}, "drain": {"timeoutSeconds": 60}}
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", policy=policy)
    launcher = processes.python("-c", LAUNCHER, env=sidecar.trainer)
    deadlines.eventually(lambda: "trains" in launcher.stdout, Deadline.TORCH_START, "the trainer to train")
    assert sidecar.ask("notify")["type"] == "notified"
    assert launcher.wait(Deadline.DRAINED) == 0, launcher.tail()
    assert launcher.stdout.splitlines() == ["trains", "ended 143", "ended 143"]
    # The last save, and what was staged while it was written.
    assert committed(tmp_path / "run")[0] > 100
    sidecar.run.signal(signal.SIGTERM)
    assert sidecar.run.wait(Deadline.DRAINED) == 0, sidecar.run.tail()
