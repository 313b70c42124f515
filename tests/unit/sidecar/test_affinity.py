"""
The whole of: an embedded sidecar works where its trainers do, and not where the first of them was bound to.

Called from: pytest.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pillion_sidecar import affinity

CPUS = sorted(os.sched_getaffinity(0))
TELLS = "import os; print(sorted(os.sched_getaffinity(0)), flush=True); input(); print(sorted(os.sched_getaffinity(0)))"

pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two processors")


@contextlib.contextmanager
def bound_to(cpu: int) -> Iterator[subprocess.Popen[str]]:
    """A process that may use one processor only, as a rank under numactl."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", TELLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    finally:
        os.sched_setaffinity(0, before)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == f"[{cpu}]\n"
        yield child
        if child.poll() is None:
            child.communicate("\n")


def test_a_process_gets_the_processors_of_those_it_works_for_and_no_others() -> None:
    """The sidecar was started by a rank that is bound to one; with the next rank that joins it may use that one's as well."""
    with bound_to(CPUS[0]) as sidecar, bound_to(CPUS[1]) as rank:
        affinity.widen([sidecar.pid, 0], affinity.processors(rank.pid))
        told, _ = sidecar.communicate("\n")
    assert told == f"[{CPUS[0]}, {CPUS[1]}]\n"


def test_memory_for_a_rank_is_taken_on_its_own_processors() -> None:
    """The thread runs there for as long as it takes memory; where the rank's process is not seen it stays where it is."""
    before = os.sched_getaffinity(0)
    with bound_to(CPUS[1]) as rank:
        with affinity.beside(rank.pid):
            assert os.sched_getaffinity(0) == {CPUS[1]}
        assert os.sched_getaffinity(0) == before
    for nobody in (0, -1, 2**22 + 1):
        with affinity.beside(nobody):
            assert os.sched_getaffinity(0) == before


def test_forgetting_the_memory_policy_leaves_the_process_at_work() -> None:
    """Also where the kernel refuses it, as some sandboxes do."""
    affinity.forget_memory_policy()
