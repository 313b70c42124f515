"""
The whole of: how the programs of the test cluster are built, with a `go` that writes down what it is asked.

Called from: pytest.
"""

import os
import signal
from pathlib import Path

import pytest

from cluster.harness import binaries
from cluster.harness.limits import CACHE_VARIABLE, Limit
from cluster.harness.machine import HarnessError, run
from support.deadlines import Deadline, eventually

GO = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "${2##*/}" >> "$ASKED"
[ "${2##*/}" != "$REFUSED" ] && echo built > "$2"
"""
SPAWNS = 'trap "" INT; sleep 600 & echo $! > "$1"; wait'
"""A driver with a child, as `go build` is one of compilers; it does not listen when it is asked to end."""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the `go` on the path was asked to build, a name a line."""
    go = tmp_path / "bin" / "go"
    go.parent.mkdir()
    go.write_text(GO)
    go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{go.parent}:{os.environ['PATH']}")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    return tmp_path / "asked"


def test_each_program_is_kept_and_the_next_try_builds_the_rest(
    asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A build that ends at the third of six keeps two, says where it was, and the next try asks for four."""
    names = binaries.PROGRAMS["kubernetes"]
    monkeypatch.setenv("REFUSED", names[2])
    with pytest.raises(HarnessError, match=names[2]):
        binaries.build(names)
    assert [binaries.place(name).exists() for name in names] == [True, True, False, False, False, False]
    assert f"building {names[2]} from its Go module (3 of 6)" in capsys.readouterr().err
    monkeypatch.setenv("REFUSED", "nothing")
    binaries.build(names)
    assert asked.read_text().split() == [*names[:3], *names[2:]]
    binaries.build(names)
    assert len(asked.read_text().split()) == 7, "what is there is not built again"
    assert [path.name for path in (binaries.folder("kubernetes").parent).iterdir()] == [
        binaries.folder("kubernetes").name
    ]


def test_a_command_that_its_bound_ends_leaves_none_of_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound ends a command with what it has started, also where that ignores the signal that asks for it."""
    monkeypatch.setattr(Limit.COMMAND, "s", 0.3)
    monkeypatch.setattr(Limit.INTERRUPTED, "s", 0.1)
    child = tmp_path / "child"
    with pytest.raises(HarnessError, match="not done within"):
        run("sh", "-c", SPAWNS, "sh", child)
    pid = int(child.read_text())

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    eventually(gone, Deadline.SETTLE, f"process {pid}, which {signal.SIGKILL.name} was sent to, to be gone")
