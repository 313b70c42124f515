"""
The whole of: Ray Train starts dead workers again, and they resume from what they had saved.

Called from: pytest, in the environment that has Ray.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
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


@pytest.mark.timeout(WALL_S)
def test_workers_of_ray_train_that_die_resume_as_the_run_without_ray_and_pillion_went_on(
    processes: Processes, ranks: Ranks, tmp_path: Path, short: Path
) -> None:
    """Losses and weights, bit for bit: from memory at Ray's own restart of the workers, and from storage in another Ray."""

    def job(name: str, kill_at: int) -> None:
        # Ray gives its workers a minute to start, on any machine; and memory is kept while they do.
        limits = dict.fromkeys(("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "PILLION_LINGER_S"), str(Deadline.TORCHRUN.s))
        env = {**ENV, **limits}
        processes.python(ray_job.__file__, tmp_path, root, name, str(kill_at), short, env=env).check(Deadline.TORCHRUN)

    def loaded(name: str) -> list[list[object]]:
        return [json.loads((tmp_path / name / f"loaded.{rank}").read_text()) for rank in range(RANKS)]

    root = tmp_path / "runs"
    ranks.start(lambda peer: ray_job.without(peer, tmp_path / "whole"), num_ranks=RANKS).finish(Deadline.SCRIPT)
    job("first", KILLED_AT)
    assert loaded("first-again") == [[KILLED_AT - 1, "arena"]] * RANKS
    ranks.alone()
    for later in range(7, 13):
        shutil.rmtree(root / f"step-{later}", ignore_errors=True)
    job("storage", -1)
    assert loaded("storage") == [[6, "storage"]] * RANKS
    whole, first = tmp_path / "whole", tmp_path / "first"
    for second, step in (("first-again", KILLED_AT - 1), ("storage", 6)):
        losses.assert_equal(whole, first, tmp_path / second, ranks=RANKS, killed_at=KILLED_AT, resumed_from=step)
