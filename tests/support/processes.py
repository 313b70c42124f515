"""
The whole of: starting real programs in a test, finding their ranks, and ending them whatever happened.

Called from: tests of the levels `process` and `distributed`, through the fixture `processes`.
Must never: leave a process running, kill by name, or share its session with the test (a signal to the group would
reach pytest).
"""

import os
import signal as signals
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, final

import psutil
import pytest

from support import deadlines, leaks

_TAIL_CHARS: Final = 4000


@final
class Run:
    """
    One program that was started, with its output in two files.
    """

    def __init__(self, popen: "subprocess.Popen[bytes]", stdout_path: Path, stderr_path: Path) -> None:
        self.popen = popen
        self.stdout_path = stdout_path
        self.stderr_path = stderr_path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    def wait(self, deadline: deadlines.Deadline) -> int:
        """
        Gives the exit status; negative is the signal that ended it, as in subprocess.

        Blocks: up to deadline.s.

        Raises:
          DeadlinePassed: it still runs; the message carries the end of its output.
        """
        try:
            return self.popen.wait(timeout=deadline.s)
        except subprocess.TimeoutExpired as err:
            raise deadlines.DeadlinePassed(f"still running after {deadline.s:.0f} s: {self.tail()}") from err

    def check(self, deadline: deadlines.Deadline) -> "Run":
        """
        Waits for exit status 0.

        Raises:
          AssertionError: another status, with the end of the output.
        """
        status = self.wait(deadline)
        assert status == 0, f"exit status {status}: {self.tail()}"
        return self

    def tail(self) -> str:
        """
        The end of both outputs, for a message.
        """
        return (
            f"{self.popen.args!r}\n--- stdout\n{self.stdout[-_TAIL_CHARS:]}\n--- stderr\n{self.stderr[-_TAIL_CHARS:]}"
        )

    def signal(self, number: signals.Signals) -> None:
        """
        Sends a signal to the program itself, not to its children.
        """
        self.popen.send_signal(number)

    def ranks(self) -> dict[int, psutil.Process]:
        """
        The trainers of a torchrun that are alive now, by rank.

        Only direct children count: what a trainer starts inherits RANK too.
        """
        found = {}
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return {}
        for child in children:
            try:
                environment = child.environ()
            except (psutil.Error, OSError):
                continue
            if "RANK" in environment and "TORCHELASTIC_RUN_ID" in environment:
                found[int(environment["RANK"])] = child
        return found

    def signal_rank(self, rank: int, number: signals.Signals) -> int:
        """
        Sends a signal to one trainer of a torchrun, once it is there; gives its pid.

        Blocks: up to Deadline.TORCH_START.
        """
        process = deadlines.eventually(
            lambda: self.ranks().get(rank), deadlines.Deadline.TORCH_START, f"rank {rank} of torchrun is there"
        )
        assert process is not None
        process.send_signal(number)
        return process.pid


@final
class Processes:
    """
    Starts programs for one test and ends all of them, with everything they started, at teardown.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self._folder = folder
        self._mark = mark
        self._runs: list[Run] = []

    def python(self, *argv: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> Run:
        """
        Starts this venv's interpreter with these arguments: a script and its own, or "-c", or "-m".

        `env` is laid over the test's own environment.
        """
        return self.program(sys.executable, *argv, env=env)

    def program(self, *argv: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> Run:
        """
        Starts any program, such as the interpreter of another environment.
        """
        return self._start([os.fspath(argument) for argument in argv], env)

    def torchrun(
        self,
        script: Path,
        *argv: str | os.PathLike[str],
        num_ranks: int = 2,
        max_restarts: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> Run:
        """
        Starts a script under torchrun on this machine, on a free port that torchrun chooses itself.
        """
        options = ["--standalone", f"--nproc-per-node={num_ranks}", f"--max-restarts={max_restarts}"]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            os.fspath(script),
            *[os.fspath(argument) for argument in argv],
        ]
        # torchrun sets OMP_NUM_THREADS=1 by itself, with a warning, when it is not set.
        return self._start(command, {"OMP_NUM_THREADS": "1", **(env or {})})

    def reap(self) -> None:
        """
        Ends what still runs, and what it started: SIGTERM to the program, then SIGKILL to everything with the mark.

        Blocks: up to Deadline.PROCESS_EXIT for each program.
        """
        for run in self._runs:
            if run.popen.poll() is None:
                run.signal(signals.SIGTERM)
        for run in self._runs:
            try:
                run.popen.wait(timeout=deadlines.Deadline.PROCESS_EXIT.s)
            except subprocess.TimeoutExpired:
                run.popen.kill()
                run.popen.wait()
        leaks.end([process for process in psutil.process_iter() if leaks.carries(process, self._mark)])

    def _start(self, command: Sequence[str], env: Mapping[str, str] | None) -> Run:
        number = len(self._runs)
        stdout_path = self._folder / f"{number}.stdout"
        stderr_path = self._folder / f"{number}.stderr"
        environment = {**os.environ, **(env or {}), leaks.MARK_VARIABLE: self._mark}
        with stdout_path.open("wb") as stdout, stderr_path.open("wb") as stderr:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
        run = Run(popen, stdout_path, stderr_path)
        self._runs.append(run)
        return run


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory, nothing_left: str) -> Iterator[Processes]:
    """
    Programs for one test. What the test itself left running is a leak only when it outlives this teardown.
    """
    group = Processes(tmp_path_factory.mktemp("processes"), nothing_left)
    try:
        yield group
    finally:
        group.reap()
