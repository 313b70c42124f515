"""
The whole of: trainers on the oldest torch that is supported, beside sidecars on the newest: what a cluster has whose training images are old.

Called from: `make test-oldest-torch`, which makes the environment. Elsewhere the tests are skipped with the reason.
Must never: let a trainer find a client other than the one that the sidecar's image lays out for it, or compare with a tolerance.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from guard import repository
from pillion_sidecar.client_bundle import install
from process.injected import Injected
from support.deadlines import Deadline
from support.processes import Processes, Run

VARIABLE: Final = "PILLION_OLDEST_TORCH_PYTHON"
"""Names the interpreter of the trainers: requirements/oldest.lock, and nothing of Pillion."""
OLDEST: Final = "2.6."
CHARLM: Final = repository.ROOT / "examples" / "charlm"
POLICY: Final = {"trigger": {"periodSteps": 10, "snapshotSteps": 5}, "staging": {"sizeLimit": "256Mi"}}
STEPS: Final = 30
KILLED_AT: Final = 18
"""Behind the snapshot of step 15, before the checkpoint of step 20."""


@pytest.fixture(scope="module")
def oldest() -> Path:
    """The trainers' interpreter: it has the oldest torch, and no client of its own."""
    if not (named := os.environ.get(VARIABLE)):
        pytest.skip("needs an environment with the oldest torch: make test-oldest-torch")
    code = "import torch, importlib.util as u; print(torch.__version__, u.find_spec('pillion') is None)"
    done = subprocess.run(
        [named, "-c", code], capture_output=True, text=True, check=True, timeout=Deadline.TORCH_START.s
    )
    version, bare = done.stdout.split()
    assert version.startswith(OLDEST), version
    assert bare == "True"
    return Path(named)


class Scene:
    """One job of two ranks, in one pod or in two, with what it leaves."""

    def __init__(self, oldest: Path, processes: Processes, folder: Path, parallel: str) -> None:
        self.oldest, self.processes, self.folder, self.parallel = oldest, processes, folder, parallel
        self.client = folder / "client"
        install.lay_out(self.client)
        self.root = folder / "run"

    def start(self, sidecars: list[Injected], *more: str, name: str) -> list[Run]:
        """torchrun in each pod; without sidecars one torchrun that trains without Pillion."""
        pods: list[Mapping[str, str]] = [each.trainer for each in sidecars] or [{}]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = str(CHARLM / "train.py")
        return [
            self.processes.program(
                *(str(self.oldest), "-m", "torch.distributed.run", f"--nnodes={len(pods)}", f"--node-rank={index}"),
                *(f"--nproc-per-node={2 // len(pods)}", "--master-addr=127.0.0.1", f"--master-port={port}"),
                *(script, "--parallel", self.parallel, "--steps", str(STEPS)),
                *("--losses", str(self.folder / f"{name}.losses"), "--report", str(self.folder / f"{name}.report")),
                *("--final", str(self.folder / f"{name}.final"), *more),
                env={"PYTHONPATH": str(self.client), "OMP_NUM_THREADS": "1", **pod},
            )
            for index, pod in enumerate(pods)
        ]

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def losses(self, name: str) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.lines(f"{name}.losses")}

    def equals(self, python: Path, step: int, name: str) -> None:
        """Stock `dcp.load` under `python` reads the checkpoint, and every bit is that of the run `name`."""
        arguments = ["--checkpoint", str(self.root / f"step-{step}"), "--final", str(self.folder / f"{name}.final")]
        self.processes.program(python, CHARLM / "verify.py", *arguments).check(Deadline.SCRIPT)


@pytest.mark.timeout(900)
# Not FSDP2: on a CPU torch 2.6 cannot run it, with Pillion or without.
@pytest.mark.parametrize(("parallel", "num_pods"), [("ddp", 1), ("ddp", 2)])
def test_a_job_on_the_oldest_torch_resumes_bit_for_bit_beside_newest_sidecars(
    oldest: Path, processes: Processes, tmp_path: Path, parallel: str, num_pods: int
) -> None:
    """A killed rank, a second start: it loads the newest snapshot from memory, and losses and weights are those of a run without Pillion; stock DCP reads them."""
    scene = Scene(oldest, processes, tmp_path, parallel)
    for run in scene.start([], "--no-checkpoint", name="without"):
        run.check(Deadline.TORCHRUN)
    sidecars = [
        Injected(processes, tmp_path / f"arena-{index}", scene.root, policy=POLICY, pod=f"uid-{index}")
        for index in range(num_pods)
    ]
    for run in scene.start(sidecars, "--kill-rank", "1", "--kill-at-step", str(KILLED_AT), name="killed"):
        assert run.wait(Deadline.TORCHRUN) != 0, run.tail()
    for run in scene.start(sidecars, name="resumed"):
        run.check(Deadline.TORCHRUN)
    loaded = [(line["step"], line["tier"]) for line in scene.lines("resumed.report") if line["event"] == "loaded"]
    assert loaded == [(15, "arena")]
    assert scene.losses("killed") | scene.losses("resumed") == scene.losses("without")
    assert min(scene.losses("resumed")) == 16
    for sidecar in sidecars:
        sidecar.run.signal(signal.SIGTERM)
    for sidecar in sidecars:
        assert sidecar.run.wait(Deadline.DRAINED) == 0, sidecar.run.tail()
        assert "torch's own client" not in (sidecar.run.stdout + sidecar.run.stderr), (
            "the store of torch 2.6 was not understood"
        )
    # Not by the newest torch, whose AdamW has a hyperparameter that the oldest one's lacks.
    scene.equals(oldest, STEPS, "without")
