"""The fault kit: what it requests, how often it strikes, and that it is off by default."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pillion import fault_points
from pillion.fault_points import FaultPoint
from pillion.testing import faults
from pillion.testing.faults import Kind, fail_at
from pillion.wire import names
from support.deadlines import Deadline


@pytest.fixture(autouse=True)
def disarmed() -> object:
    """No fault of one test strikes in another."""
    yield
    fault_points.observe(None)


def arm(monkeypatch: pytest.MonkeyPatch, folder: Path, *of: faults.Fault) -> None:
    for name, value in faults.to_environment(folder, of).items():
        monkeypatch.setenv(name, value)
    faults.arm()


def test_a_fault_strikes_at_its_phase_step_and_rank_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else passes the point passes it."""
    arm(monkeypatch, tmp_path, fail_at(rank=1, phase=FaultPoint.WRITE, fault=Kind.EIO, step=20))
    fault_points.reach(FaultPoint.FSYNC, rank=1, step=20)
    fault_points.reach(FaultPoint.WRITE, rank=0, step=20)
    fault_points.reach(FaultPoint.WRITE, rank=1, step=10)
    assert faults.hits(tmp_path) == []
    with pytest.raises(OSError, match="Input/output error"):
        fault_points.reach(FaultPoint.WRITE, rank=1, step=20, path="file")
    assert faults.hits(tmp_path) == [faults.Hit(index=0, pid=os.getpid(), step=20, path="file")]


def test_a_fault_strikes_as_often_as_it_was_asked_to_whatever_restarts_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each strike claims a file, which outlives the process."""
    arm(monkeypatch, tmp_path, fail_at(phase=FaultPoint.COMMIT, fault=Kind.ENOSPC, times=2))
    struck = 0
    for _ in range(5):
        faults.arm()  # as a restarted process
        try:
            fault_points.reach(FaultPoint.COMMIT)
        except OSError:
            struck += 1
    assert struck == len(faults.hits(tmp_path)) == 2


@pytest.mark.parametrize("kind", [Kind.CUT, Kind.FLIP])
def test_storage_that_lies_changes_the_file_and_reports_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """The call returns, and the file is not what was written."""
    (tmp_path / "hits").mkdir()
    arm(monkeypatch, tmp_path / "hits", fail_at(phase=FaultPoint.FSYNC, fault=kind))
    file = tmp_path / "data"
    file.write_bytes(bytes(100))
    fault_points.reach(FaultPoint.FSYNC, path=str(file))
    assert file.read_bytes() != bytes(100)


@pytest.mark.parametrize(
    "text", ["", "x", "{}", '{"folder": "/nowhere", "faults": []}', '{"folder": ".", "faults": [{"phase": "lunch"}]}']
)
def test_faults_that_cannot_be_read_are_refused_with_what_is_allowed(text: str) -> None:
    """A typo is no run without faults."""
    with pytest.raises(faults.BadFaults, match="PILLION_FAULTS"):
        faults.parse(text)


def test_it_is_off_and_not_even_imported_unless_it_is_asked_for() -> None:
    """A process without the variable has no observer, and has not loaded the kit."""
    code = "import sys, pillion.fault_points as p; print(p._observer, 'pillion.testing.faults' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != names.ENV_FAULTS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=Deadline.PROCESS_START.s
    )
    assert done.stdout.split() == ["None", "False"]


def test_a_process_whose_environment_asks_is_armed_from_its_first_import(tmp_path: Path) -> None:
    """Without a line of its own."""
    asked = faults.to_environment(tmp_path, [fail_at(phase=FaultPoint.PLAN, fault=Kind.SIGKILL)])
    code = "from pillion import fault_points; fault_points.reach(fault_points.FaultPoint.PLAN); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=Deadline.PROCESS_START.s,
    )
    assert (done.returncode, done.stdout) == (-9, "")
    assert json.loads((tmp_path / "0.0.hit").read_text())["step"] is None
