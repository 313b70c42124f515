"""
The whole of: a small seeded slice of the kill campaign; `make campaign` runs as many as one likes.

Called from: pytest.
"""

import json
from pathlib import Path
from typing import Final

import pytest

from campaign import plan, training
from campaign.plan import Strike
from campaign.runs import Run

SEEDS: Final = (492, 306, 316, 339)
"""A trainer that the kernel kills beside a data loader whose worker is stuck, and that rolls back later; a sidecar, the pods, and the whole
job; two pods that lose a sidecar; a trainer that crashes."""


@pytest.fixture
def ready(warm: None, nothing_left: str) -> None:
    """What torch makes once a process is there before anybody looks at descriptors."""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_struck_at_random_ends_as_if_nothing_had_been(ready: None, tmp_path: Path, seed: int) -> None:
    """Losses, weights and every committed checkpoint are those of an uninterrupted run, and no more is lost than declared."""
    result = Run(plan.draw(seed), tmp_path / "run", training.reference()).run()
    assert result.verdict == "ok", json.dumps(result.document(), indent=2)


def test_the_slice_kills_a_trainer_whose_data_loader_has_workers() -> None:
    """Its trainers run under torchrun's agent with a forked worker each; one is struck by SIGKILL in the middle of an epoch, one by the
    loss of its pod, one beside a second pod."""
    runs = [plan.draw(seed) for seed in SEEDS]
    killed = [act for each in runs if each.stuck for act in each.acts if act.strike is Strike.KILL_TRAINER]
    assert any(1 < act.at_step < training.STEPS for act in killed)
    assert {Strike.SEGV_TRAINER, Strike.KILL_SIDECAR, Strike.LOSE_JOB} <= {
        act.strike for each in runs for act in each.acts
    }
    assert {each.pods for each in runs} == {1, 2}


def test_a_run_is_repeated_by_its_seed() -> None:
    """The same strikes at the same steps, and other ones for another seed."""
    assert plan.draw(7) == plan.draw(7)
    assert len({plan.draw(seed) for seed in range(50)}) == 50


def test_every_strike_and_every_fault_is_drawn() -> None:
    """A thousand runs hold all of them, on one pod and on two."""
    drawn = [plan.draw(seed) for seed in range(1000)]
    assert {act.strike for each in drawn for act in each.acts} == set(Strike)
    assert {each.inside for each in drawn} == set(plan.Inside)
    assert {each.pods for each in drawn} == {1, 2}
