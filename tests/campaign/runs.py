"""
The whole of: one run of the campaign: start the job, strike, start again what a cluster would start again, and judge the end.

Called from: `campaign.__main__`, tests/distributed/test_campaign.py.
Must never: end a process that it did not start, nor leave one behind.
"""

import contextlib
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch.distributed import checkpoint as stock

from campaign import job as jobs
from campaign import plan as plans
from campaign import training
from campaign.job import Job
from campaign.plan import Act, Plan, Strike
from pillion.testing import faults
from support import leaks
from support.store_host import StoreHost

RUN_S: Final = 100.0
"""Bound for one run: a hundred times its training. Beyond it the run is hung."""
BOUNDS: Final = {
    "PILLION_PEER_TIMEOUT_S": "15",
    "PILLION_PERSIST_TIMEOUT_S": "30",
    "PILLION_PING_TIMEOUT_S": "3",
    "PILLION_STORAGE_TIMEOUT_S": "2",
    "PILLION_STORE_TIMEOUT_S": "3",
    "PILLION_LINGER_S": "30",
}
LOST_IN_MEMORY: Final = 2 * jobs.SNAPSHOT_STEPS
"""Declared recovery point, in steps, while the pods live: the newest snapshot may be torn, the one before is whole."""
LOST_ON_STORAGE: Final = 2 * jobs.PERIOD_STEPS
"""The same when a pod's memory is gone: the newest save may be on its way. A save that storage refuses four times, or that meets an
executor that dies twice, costs one period more."""
ALONE_S: Final = 60.0
"""Bound for the sidecars to end by themselves: one that was stopped while its trainers said goodbye lingers."""
AWAY_S: Final = 5.0
"""Declared for a sidecar that was struck itself, in seconds of training: until it is back, or goes on, nothing is saved. Steps here take
10 ms, so that it is hundreds of them."""
ALONE_POLL_S: Final = 0.1
"""Between two looks at every process of the machine."""
TAIL_BYTES: Final = 400
"""Of a journal: its last few lines, looked at a hundred times a second."""
POLL_S: Final = 0.01


@dataclass
class Result:
    """What became of one run."""

    seed: int
    pods: int
    strikes: list[str]
    inside: str
    struck: list[str] = field(default_factory=list)
    """What really hit something; a strike may come after the end."""
    attempts: int = 0
    tiers: list[str] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    """Steps that were trained and had to be trained again, for each restart."""
    lost_s: list[float] = field(default_factory=list)
    """The same in seconds of training."""
    memory_lost: bool = False
    committed: int = 0
    elapsed_s: float = 0.0
    verdict: str = "ok"
    """ok, torn, lost, hung, wrong, leaked."""
    detail: str = ""

    def document(self) -> dict[str, Any]:
        return asdict(self)


AWAY: Final = frozenset(
    each.value
    for each in (
        Strike.KILL_SIDECAR,
        Strike.STOP_SIDECAR,
        Strike.KILL_BOTH,
        Strike.KILL_EXECUTOR,
        Strike.STOP_EXECUTOR,
    )
)


class Run:
    """One run."""

    def __init__(
        self, plan: Plan, folder: Path, reference: list[tuple[float, dict[str, torch.Tensor]]], *, disks: bool = False
    ) -> None:
        self._plan = plan
        self._reference = reference
        self._mark = f"campaign-{os.getpid()}-{plan.seed}"
        self.job = Job(folder=folder, pods=plan.pods, stuck=plan.stuck, rollback_at=plan.rollback_at, disks=disks)
        self._kit = folder / "faults"
        self._agents: dict[int, int] = {}
        self._store: StoreHost | None = None
        self._waking: list[tuple[float, int]] = []
        self._environment: dict[str, str] = {}
        self.result = Result(
            seed=plan.seed, pods=plan.pods, strikes=[act.strike.value for act in plan.acts], inside=plan.inside.value
        )

    def run(self) -> Result:
        """Run it. Blocks: up to RUN_S, and for the end of what it started."""
        self._kit.mkdir(parents=True)
        self._environment = {**BOUNDS, leaks.MARK_VARIABLE: self._mark}
        if self._plan.faults:
            self._environment |= faults.to_environment(self._kit, self._plan.faults)
        begun = time.monotonic()
        try:
            self._start()
            acts = list(self._plan.acts)
            due_s: float | None = None
            while not self._ended():
                now = time.monotonic() - begun
                if now > RUN_S:
                    self._judge("hung", self._tails())
                    return self.result
                if acts and due_s is None and self._step() >= acts[0].at_step:
                    due_s = now + acts[0].delay_s
                if acts and due_s is not None and now >= due_s:
                    self._strike(acts.pop(0))
                    due_s = None
                self._wake()
                time.sleep(POLL_S)
            self.result.elapsed_s = round(time.monotonic() - begun, 2)
            self._alone()
            self._check()
        finally:
            self._end()
        return self.result

    def _step(self) -> int:
        """How far rank 0 is."""
        said = jobs.journal(self.job, 0, newest_bytes=TAIL_BYTES)
        return max((line["step"] for line in said if line["event"] == "step"), default=0)

    # --- starting and ending -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._store = StoreHost()
        for pod in range(self._plan.pods):
            self._agents[pod] = jobs.agent(self.job, pod, self._store.port, self._environment)

    def _ended(self) -> bool:
        """Whether the job is done. An agent that gave up is started again, as a Job starts a pod again."""
        for pod, pid in list(self._agents.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._agents[pod]
                if status != 0:
                    self._restart_agents()
                    # The others that were looked at are gone with it.
                    break
        return not self._agents

    def _restart_agents(self) -> None:
        for pid in self._agents.values():
            self._kill_tree(pid)
        self._agents.clear()
        if self._store is not None:
            self._store.end()
        self._start()

    def _kill_tree(self, pid: int) -> None:
        """An agent, and the trainers that it forked: its sidecar stays, it is a daemon of the pod."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(pid).children(recursive=True)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            for child in children:
                if not _is_sidecar(child) and not _is_executor(child):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()

    def _alone(self) -> None:
        """Embedded sidecars end by themselves, with their arenas."""
        deadline = time.monotonic() + ALONE_S
        while self._sidecars() and time.monotonic() < deadline:
            self._wake()
            time.sleep(ALONE_POLL_S)
        if left := self._sidecars():
            self._judge("leaked", f"{len(left)} sidecars run on")

    def _end(self) -> None:
        for pid in self._agents.values():
            self._kill_tree(pid)
        if self._store is not None:
            self._store.end()
        self.job.folder.joinpath(training.ENDED).touch()
        folders = {_runtime_dir(process) for process in self._sidecars()}
        leaks.end([process for process in psutil.process_iter() if leaks.carries(process, self._mark)])
        for folder in folders:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    # --- striking ----------------------------------------------------------------------------------------------------

    def _marked(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if leaks.carries(process, self._mark)]

    def _sidecars(self, pod: int | None = None) -> list[psutil.Process]:
        return [each for each in self._marked() if _is_sidecar(each) and (pod is None or self._pod_of(each) == pod)]

    def _executors(self, pod: int) -> list[psutil.Process]:
        found = [each for each in self._marked() if _is_executor(each)]
        return [each for each in found if self._pod_of(each) == pod]

    def _pod_of(self, process: psutil.Process) -> int:
        with contextlib.suppress(psutil.Error):
            return int(process.environ().get("PILLION_POD", "-0").rpartition("-")[2])
        return -1

    def _trainer(self, rank: int) -> int | None:
        said = jobs.journal(self.job, rank)
        if not said or said[-1]["event"] == "done":
            return None
        pid = int(said[-1]["pid"])
        with contextlib.suppress(psutil.Error):
            # Forked, not executed: its environment in /proc is this process's, so that only its parent tells whose it is.
            process = psutil.Process(pid)
            if process.ppid() in self._agents.values() and process.status() != psutil.STATUS_ZOMBIE:
                return pid
        return None

    def _strike(self, act: Act) -> None:
        pod = act.rank if self._plan.pods == 2 else 0
        strike = act.strike
        hit: list[int] = []
        if strike in (Strike.KILL_TRAINER, Strike.SEGV_TRAINER, Strike.STOP_TRAINER):
            pid = self._trainer(act.rank)
            hit = [pid] if pid is not None else []
        elif strike in (Strike.KILL_SIDECAR, Strike.STOP_SIDECAR):
            hit = [each.pid for each in self._sidecars(pod)]
        elif strike in (Strike.KILL_EXECUTOR, Strike.STOP_EXECUTOR):
            hit = [each.pid for each in self._executors(pod)]
        elif strike is Strike.KILL_BOTH:
            hit = [each.pid for each in (*self._sidecars(pod), *self._executors(pod))]
        elif strike is Strike.KILL_POD:
            self._lose_pod(pod)
            hit = [0]
        else:
            for each in list(self._agents.values()):
                self._kill_tree(each)
            self._agents.clear()
            if strike is Strike.LOSE_JOB:
                for each in range(self._plan.pods):
                    self._lose_memory(each)
            if self._store is not None:
                self._store.end()
            self._start()
            hit = [0]
        number = signal.SIGKILL
        if strike is Strike.SEGV_TRAINER:
            number = signal.SIGSEGV
        elif strike in (Strike.STOP_TRAINER, Strike.STOP_SIDECAR, Strike.STOP_EXECUTOR):
            number = signal.SIGSTOP
        for pid in hit:
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    if number is signal.SIGSTOP:
                        self._waking.append((time.monotonic() + act.pause_s, pid))
        if hit:
            self.result.struck.append(strike.value)

    def _wake(self) -> None:
        for due, pid in list(self._waking):
            if time.monotonic() >= due:
                self._waking.remove((due, pid))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _lose_pod(self, pod: int) -> None:
        if pod in self._agents:
            self._kill_tree(self._agents.pop(pod))
        self._lose_memory(pod)
        if self._store is not None:
            self._agents[pod] = jobs.agent(self.job, pod, self._store.port, self._environment)

    def _lose_memory(self, pod: int) -> None:
        self.result.memory_lost = True
        for process in (*self._sidecars(pod), *self._executors(pod)):
            folder = _runtime_dir(process)
            with contextlib.suppress(psutil.Error):
                process.kill()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
        if self._plan.seed % 2:
            # A disk that is an emptyDir goes with its pod; one of the node stays.
            shutil.rmtree(self.job.disk(pod), ignore_errors=True)

    # --- judging -----------------------------------------------------------------------------------------------------

    def _judge(self, verdict: str, detail: str) -> None:
        if self.result.verdict == "ok":
            self.result.verdict, self.result.detail = verdict, detail[-3000:]

    def _tails(self) -> str:
        found = [path.read_text(errors="replace")[-700:] for path in sorted(self.job.folder.glob("agent.*"))]
        found += [path.read_text(errors="replace")[-700:] for path in sorted(self.job.root.glob(".pillion/*.log"))]
        return "\n".join(found)

    def _check(self) -> None:
        trained = self._check_journals()
        self._check_end(self._check_storage(), trained)
        final = torch.load(self.job.folder / "final.pt")
        for name, tensor in final.items():
            if not torch.equal(self._reference[training.STEPS][1][name], tensor):
                self._judge("wrong", f"{name} at the end differs from the uninterrupted run's")

    def _check_journals(self) -> dict[int, float]:
        """When each step was made last, by the last rank's clock; 0: when it began."""
        trained: dict[int, float] = {}
        for rank in range(training.WORLD):
            furthest, attempts = 0, 0
            trained = {}
            for line in jobs.journal(self.job, rank):
                if line["event"] == "started":
                    attempts += 1
                    trained.setdefault(0, line["time"])
                    if rank == 0:
                        self.result.tiers.append(line["tier"] or "fresh")
                        if attempts > 1:
                            lost_s = trained[furthest] - trained[line["loaded"]]
                            self._check_lost(furthest, line["loaded"], line["tier"], lost_s)
                elif line["event"] == "rolled":
                    furthest = line["loaded"]
                elif line["event"] == "step":
                    furthest = max(furthest, line["step"])
                    trained[line["step"]] = line["time"]
                    if line["loss"] != self._reference[line["step"]][0]:
                        self._judge("wrong", f"rank {rank}: the loss of step {line['step']} differs")
            self.result.attempts = max(self.result.attempts, attempts)
            if furthest != training.STEPS:
                self._judge("wrong", f"rank {rank} ended at step {furthest}")
        return trained

    def _check_lost(self, furthest: int, loaded: int, tier: str, lost_s: float) -> None:
        # Behind a rollback that nothing was saved after, the newest is what was saved before it.
        lost = max(0, furthest - loaded)
        self.result.lost_steps.append(lost)
        self.result.lost_s.append(round(lost_s, 2))
        in_memory = not self.result.memory_lost and not self._troubled
        bound = LOST_IN_MEMORY if in_memory else self._bound_on_storage
        if lost > bound and not (self._away and lost_s <= AWAY_S):
            self._judge("lost", f"{lost} steps were lost ({furthest} to {loaded}, {tier}); the bound is {bound}")

    def _check_end(self, newest: int, trained: dict[int, float]) -> None:
        """What is committed when the job has ended is as near to its last step as a loss of memory may leave it."""
        lost_s = trained.get(training.STEPS, 0.0) - trained.get(newest, 0.0)
        if training.STEPS - newest > self._bound_on_storage and not (self._away and lost_s <= AWAY_S):
            self._judge(
                "lost", f"step {newest} is the newest committed at the end; the bound is {self._bound_on_storage} steps"
            )

    @property
    def _troubled(self) -> bool:
        return self._plan.inside is not plans.Inside.NONE

    @property
    def _bound_on_storage(self) -> int:
        return LOST_ON_STORAGE + (jobs.PERIOD_STEPS if self._troubled else 0)

    @property
    def _away(self) -> bool:
        return any(each in AWAY for each in self.result.struck)

    def _check_storage(self) -> int:
        """The newest committed step; 0 when there is none."""
        newest = 0
        for path in sorted(self.job.root.glob("step-*")):
            if not (path / ".metadata").exists():
                continue
            self.result.committed += 1
            step = int(path.name.removeprefix("step-"))
            newest = max(newest, step)
            state = training.stock_template()
            try:
                stock.load(state, checkpoint_id=path, no_dist=True)
            except Exception as err:
                self._judge("torn", f"{path.name}: {type(err).__name__}: {err}")
                continue
            found = training.marks_of(state)
            for name, tensor in self._reference[step][1].items():
                if not torch.equal(found[name], tensor):
                    self._judge("torn", f"{path.name}: {name} is not that of step {step}")
        return newest


def _is_sidecar(process: psutil.Process) -> bool:
    return _runs(process, "pillion_sidecar")


def _is_executor(process: psutil.Process) -> bool:
    return _runs(process, "pillion_sidecar.executor.worker")


def _runs(process: psutil.Process, module: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[1:3] == ["-m", module]
    return False


def _runtime_dir(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        arguments = process.cmdline()
        if "--runtime-dir" in arguments:
            return arguments[arguments.index("--runtime-dir") + 1]
    return ""


def summary(results: list[Result]) -> dict[str, Any]:
    """The figures of many runs."""
    lost = sorted(each for result in results for each in result.lost_steps)
    return {
        "runs": len(results),
        "verdicts": dict(Counter(result.verdict for result in results)),
        "two_pods": sum(result.pods == 2 for result in results),
        "strikes": dict(Counter(each for result in results for each in result.struck)),
        "inside": dict(Counter(result.inside for result in results)),
        "restarts": len(lost),
        "tiers": dict(Counter(tier for result in results for tier in result.tiers[1:])),
        "lost_steps_median": lost[len(lost) // 2] if lost else 0,
        "lost_steps_p99": lost[int(len(lost) * 0.99)] if lost else 0,
        "lost_steps_most": lost[-1] if lost else 0,
        "lost_s_most": max((each for result in results for each in result.lost_s), default=0.0),
        "checkpoints_checked": sum(result.committed for result in results),
    }
