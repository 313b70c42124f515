"""
The whole of: Ray Train starts dead workers again, and they resume from what they had saved.

Called from: pytest, in the environment that has Ray.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from frameworks import losses, ray_job
from process.ranks import Ranks
from support.deadlines import Deadline
from support.processes import Processes

ENV: Final = {
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # otherwise it writes a token into the home directory
}
KILLED_AT: Final = 8
RANKS: Final = 2
WALL_S: Final = 2 * Deadline.TORCHRUN.s + Deadline.SCRIPT.s
"""Of the whole test: two Rays start, and one of them starts its workers twice."""


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for Ray, in which the names of its sockets stay below the limit of the system."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass
class Jobs:
    """The jobs of one test: they share a root, and each has a folder of its own below `folder`."""

    processes: Processes
    folder: Path
    rays_own: Path

    @property
    def root(self) -> Path:
        return self.folder / "runs"

    def run(self, name: str, *, kill_at: int = -1, first_killed: int = 0) -> None:
        """Run a job to its end. Blocks: up to Deadline.TORCHRUN."""
        # Ray gives its workers a minute to start, on any machine; and memory is kept while they do.
        limits = dict.fromkeys(("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "PILLION_LINGER_S"), str(Deadline.TORCHRUN.s))
        arguments = (self.folder, self.root, name, str(kill_at), str(first_killed), self.rays_own)
        self.processes.python(ray_job.__file__, *arguments, env={**ENV, **limits}).check(Deadline.TORCHRUN)

    def loaded(self, name: str) -> list[list[object]]:
        """What each rank has loaded, and from where."""
        return [json.loads((self.folder / name / f"loaded.{rank}").read_text()) for rank in range(RANKS)]


@pytest.fixture
def jobs(processes: Processes, ranks: Ranks, tmp_path: Path, short: Path) -> Jobs:
    """Jobs to compare with the folder "whole": that of the script without Ray and without Pillion, which ran through."""
    ranks.start(lambda peer: ray_job.without(peer, tmp_path / "whole"), num_ranks=RANKS).finish(Deadline.SCRIPT)
    return Jobs(processes, tmp_path, short)


@pytest.mark.timeout(WALL_S)
def test_workers_of_ray_train_that_die_resume_as_the_run_without_ray_and_pillion_went_on(
    jobs: Jobs, ranks: Ranks
) -> None:
    """Losses and weights, bit for bit: from memory at Ray's own restart of the workers, and from storage in another Ray."""
    jobs.run("first", kill_at=KILLED_AT)
    assert jobs.loaded("first-again") == [[KILLED_AT - 1, "arena"]] * RANKS
    ranks.alone()
    for later in range(7, 13):
        shutil.rmtree(jobs.root / f"step-{later}", ignore_errors=True)
    jobs.run("storage")
    assert jobs.loaded("storage") == [[6, "storage"]] * RANKS
    whole, first = jobs.folder / "whole", jobs.folder / "first"
    for second, step in (("first-again", KILLED_AT - 1), ("storage", 6)):
        losses.assert_equal(whole, first, jobs.folder / second, ranks=RANKS, killed_at=KILLED_AT, resumed_from=step)


@pytest.mark.timeout(WALL_S)
def test_a_worker_of_ray_train_that_dies_alone_takes_no_step_of_the_others_with_it(jobs: Jobs) -> None:
    """Ray ends the other worker, which has saved one step more. Both resume from the step that both have."""
    jobs.run("first", kill_at=KILLED_AT, first_killed=1)
    assert jobs.loaded("first-again") == [[KILLED_AT - 1, "arena"]] * RANKS
    whole, first, again = (jobs.folder / name for name in ("whole", "first", "first-again"))
    losses.assert_equal(whole, first, again, ranks=RANKS, killed_at=KILLED_AT, resumed_from=KILLED_AT - 1)
