"""
The whole of: the wheels, installed by pip as a user does it, do what docs/guide/laptop.md says, by the commands that stand there.

Called from: `make test-wheels`, which builds the wheels and makes the environments. Elsewhere the tests are skipped with the reason.
Must never: let anything of the checkout be imported, or run a command in the place of the page's.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from guard import repository
from support import guide, leaks
from support.deadlines import SCALE_VARIABLE, Deadline, eventually
from support.processes import Processes, Run

VARIABLE: Final = "PILLION_WHEEL_ENVIRONMENTS"
"""Names the folder that tools/wheel_environments.py filled."""
ENVIRONMENTS: Final = ("3.11-oldest", "3.11-newest", "3.12-newest", "3.13-newest")
PAGE: Final = "laptop.md"
LINGER_S: Final = 120.0
"""Seconds that the page gives a reader to start again; as slow as the machine is."""
WALL_S: Final = 3600
"""Seconds for one test: waits that are named, at the scale of a machine that also does other work."""
PREPARED: Final = """
import json, os, signal, torch
total, killed_at = 260, int(os.environ["KILLED_AT"])
def state_at(step):
    numbers = torch.arange(100_000)
    for _ in range(step):
        numbers = (numbers * 1_103_515_245 + 12_345) % 2**31
    return numbers
state_dict = {"numbers": state_at(0)}
def train_step():
    if step == start + 1:
        as_saved, loaded = torch.equal(state_dict["numbers"], state_at(start)), checkpointer.last_load
        print(json.dumps({"start": start, "as_saved": as_saved, "tier": str(loaded.tier)}), flush=True)
    if step == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    state_dict["numbers"].copy_((state_dict["numbers"] * 1_103_515_245 + 12_345) % 2**31)
"""
"""Defines what the page's loop leaves to the reader: a state that is a function of the step, so that what is loaded can be judged."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One virtual environment that has the wheels, and a folder with what the page uses of a clone."""

    folder: Path
    clone: Path

    @property
    def variables(self) -> dict[str, str]:
        """Those of a shell in which the environment is active."""
        scale = float(os.environ.get(SCALE_VARIABLE, "1"))
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(self.folder),
            "PYTHONPATH": "",
            "PILLION_LINGER_S": str(LINGER_S * scale),
        }

    def shell(self, processes: Processes, text: str, **variables: str) -> Run:
        """Start commands of the page in the clone, in a session of their own."""
        command = f"cd {shlex.quote(str(self.clone))}\n{text}"
        return processes.program("bash", "-euc", command, env={**self.variables, **variables})

    def version(self, distribution: str) -> str | None:
        """The version of an installed distribution, or None."""
        code = "import importlib.metadata as m, sys; print(*[d.version for d in m.distributions(name=sys.argv[1])])"
        done = subprocess.run(
            [self.folder / "bin" / "python", "-c", code, distribution],
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
            check=True,
            timeout=Deadline.PROCESS_START.s,
        )
        return done.stdout.strip() or None


def pins(torch: str) -> str:
    """The versions of the locks, for pip, without hashes: with them pip would ask for one of our own wheels too. The torch's lock goes first."""
    found: dict[str, str] = {}
    for name in ("oldest.lock", "dev.lock") if torch == "oldest" else ("dev.lock",):
        lines = re.findall(
            r"(?m)^([a-z0-9][\w.-]*==[^\\\n]+?) *\\?$", (repository.ROOT / "requirements" / name).read_text()
        )
        mine: dict[str, list[str]] = {}
        for line in lines:
            mine.setdefault(line.partition("==")[0], []).append(line)
        found = {each: "\n".join(pinned) for each, pinned in mine.items()} | found
    return "\n".join(found.values()) + "\n"


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment in which the page's commands of installation ran, word for word; the versions are those of the locks."""
    if not (named := os.environ.get(VARIABLE)):
        pytest.skip("needs wheels and environments for them: make test-wheels")
    version, _, torch = request.param.partition("-")
    folder = Path(named).absolute() / request.param
    if not folder.exists():
        pytest.skip(f"no environment: CPython {version} is not on this machine, or PYTHONS leaves it out")
    clone = tmp_path_factory.mktemp("clone")
    for each in ("examples", "dist"):
        shutil.copytree(repository.ROOT / each, clone / each, ignore=shutil.ignore_patterns("__pycache__"))
    made = Environment(folder, clone)
    torch_before = made.version("torch")
    assert (made.version("pillion"), made.version("pillion-sidecar")) == (None, None)
    (clone / "pins").write_text(pins(torch))
    build, install = guide.blocks(PAGE, 1)
    # The target has done that.
    assert build.split("#")[0].strip() == "make wheels"
    done = subprocess.run(
        ["bash", "-euc", install],
        cwd=clone,
        env={**os.environ, **made.variables, "PIP_CONSTRAINT": str(clone / "pins")},
        capture_output=True,
        text=True,
        timeout=Deadline.INSTALLED.s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (made.version("pillion"), made.version("pillion-sidecar")) != (None, None)
    assert made.version("pillion") == made.version("pillion-sidecar")
    assert made.version("torch") == torch_before
    return made


def none_runs(mark: str, deadline: Deadline = Deadline.DRAINED) -> None:
    """Wait until no process of the test is left, as the page says."""
    eventually(lambda: not living(mark), deadline, "trainers, torchrun and sidecar have ended")


def living(mark: str) -> list[psutil.Process]:
    return [each for each in leaks.own_processes(mark) if each.status() != psutil.STATUS_ZOMBIE]


def losses(run: Run) -> dict[int, float]:
    """By step, from the lines that are whole."""
    return {each["step"]: each["loss"] for each in lines(run) if "loss" in each}


def lines(run: Run) -> list[dict[str, Any]]:
    whole = run.stdout.rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in whole if line.startswith("{")]


def folders(root: Path) -> Sequence[str]:
    return sorted(path.name for path in root.glob("step-*"))


@pytest.mark.timeout(WALL_S)
def test_the_script_of_the_page_saves_and_resumes_and_the_commands_read_its_checkpoints(
    environment: Environment, processes: Processes, nothing_left: str
) -> None:
    """Two runs of the page's command are steps 1 to 600; then each command of section 3 ends well; afterwards no process is left."""
    (train, _), (said, resume, look) = guide.blocks(PAGE, 2), guide.blocks(PAGE, 3)
    assert textwrap.indent(resume, " " * 4) in (environment.clone / "examples" / "minimal.py").read_text()
    first = environment.shell(processes, train).check(Deadline.SCRIPT)
    assert first.stdout.splitlines()[-1] == "trained up to step 300"
    # What the page shows of the folder is what is there.
    assert folders(environment.clone / "checkpoints") == re.findall(r"step-\d+", guide.blocks(PAGE, 2)[1])
    none_runs(nothing_left)

    second = environment.shell(processes, train).check(Deadline.SCRIPT)
    assert second.stdout.splitlines()[-1] == "trained up to step 600"
    assert said.partition("(storage, ")[:2] == ("pillion: resumed from step 300 ", "(storage, ")
    assert "pillion: resumed from step 300 (storage, " in second.stderr
    looked = environment.shell(processes, look).check(Deadline.SCRIPT).stdout
    assert [step for step in range(100, 700, 100) if not re.search(rf"\b{step}\b", looked)] == []
    written = (environment.clone / "weights.safetensors").read_bytes()
    header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
    assert {name: header[name]["shape"] for name in header if name != "__metadata__"} == {
        "model.bias": [1000],
        "model.weight": [1000, 1000],
    }
    none_runs(nothing_left)


@pytest.mark.timeout(WALL_S)
def test_the_loop_of_the_page_resumes_from_the_very_state_that_it_saved(
    environment: Environment, processes: Processes, nothing_left: str
) -> None:
    """The page's own loop is killed in step 215, 5 behind a snapshot; the second run loads it from memory, and every number is that of its step."""
    (environment.clone / "loop.py").write_text(PREPARED + guide.blocks(PAGE, 4)[0])
    killed = environment.shell(processes, "python loop.py", KILLED_AT="215")
    assert killed.wait(Deadline.SCRIPT) != 0, killed.tail()
    assert lines(killed) == [{"start": 0, "as_saved": True, "tier": "fresh"}]
    resumed = environment.shell(processes, "python loop.py", KILLED_AT="0").check(Deadline.SCRIPT)
    assert lines(resumed) == [{"start": 210, "as_saved": True, "tier": "arena"}]
    none_runs(nothing_left)
    assert "step-200" in folders(environment.clone / "checkpoints" / "run-1")


@pytest.mark.timeout(WALL_S)
def test_a_rank_killed_as_on_the_page_costs_no_more_than_the_steps_behind_the_newest_snapshot(
    environment: Environment, processes: Processes, nothing_left: str
) -> None:
    """
    Start, `pgrep`, `kill -9` and start again, as section 5 has them: the newest snapshot is loaded from memory, and the steps that are repeated have the
    same losses, to the last bit. Ctrl-C ends the second run, and no process is left.
    """
    start, find, kill, _ = guide.blocks(PAGE, 5)
    killed = environment.shell(processes, start)
    between = _stop_between_snapshots(killed)
    found = processes.program(*shlex.split(find), env=environment.variables).check(Deadline.REPLY).stdout
    mine = {process.pid for process in leaks.own_processes(nothing_left)}
    ranks = [int(line.split()[0]) for line in found.splitlines() if "torchrun" not in line]
    ranks = [pid for pid in ranks if pid in mine]
    assert len(ranks) == 2, found
    assert between in ranks
    environment.shell(processes, kill.replace("PID", str(between))).check(Deadline.REPLY)
    assert killed.wait(Deadline.TORCHRUN) != 0, killed.tail()

    resumed = environment.shell(processes, start)
    last = max(losses(killed))
    eventually(
        lambda: resumed.popen.poll() is not None or max(losses(resumed), default=0) > last,
        Deadline.TORCHRUN,
        "the second run is ahead of the first",
    )
    assert resumed.popen.poll() is None, resumed.tail()
    loaded = lines(resumed)[0]
    assert (loaded["event"], loaded["tier"], loaded["step"] % 5) == ("loaded", "arena", 0)
    assert last - 10 <= loaded["step"] < last
    again = losses(resumed)
    assert min(again) == loaded["step"] + 1
    repeated = range(loaded["step"] + 1, last + 1)
    assert {step: again[step] for step in repeated} == {step: losses(killed)[step] for step in repeated}
    os.killpg(resumed.pid, signal.SIGINT)
    resumed.wait(Deadline.TORCHRUN)
    # The ranks could not part from the sidecar, so it waits for others as it did after the kill.
    none_runs(nothing_left, Deadline.LINGERED)


def _stop_between_snapshots(run: Run) -> int:
    """
    Stop rank 0 behind step 20, where its newest step is none that the page's job snapshots. Return its id.

    A person kills a rank at some step. Stopped at a chosen one first, it leaves a step for the second run to repeat.
    """

    def stopped() -> int | None:
        assert run.popen.poll() is None, run.tail()
        if max(losses(run), default=0) <= 20:
            return None
        (rank,) = [each for each in psutil.Process(run.pid).children(recursive=True) if _is_rank_0(each)]
        rank.suspend()
        eventually(lambda: rank.status() == psutil.STATUS_STOPPED, Deadline.REPLY, "the rank is stopped")
        if max(losses(run)) % 5 in (1, 2, 3, 4):
            return rank.pid
        rank.resume()
        return None

    pid = eventually(stopped, Deadline.TORCHRUN, "rank 0 is stopped between two snapshots")
    assert pid is not None
    return pid


def _is_rank_0(process: psutil.Process) -> bool:
    try:
        return process.environ().get("RANK") == "0" and "charlm/train.py" in " ".join(process.cmdline())
    except (psutil.Error, OSError):
        return False
