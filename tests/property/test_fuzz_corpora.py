"""
The whole of: the corpora of tests/fuzz, replayed, and some thousand inputs made of them.

Called from: pytest. `make fuzz` runs a million; see tests/fuzz/targets.py for what is fuzzed.
Must never: run the made inputs in this process: one that took all memory would take the other tests with it.
"""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from fuzz import engine, targets
from support.deadlines import Deadline

TESTS: Final = Path(__file__).parents[1]
RUNS: Final = 8000
"""Over all targets: some ten seconds on two cores."""


@pytest.mark.parametrize("name", [each.name for each in targets.all_targets()])
def test_what_once_was_a_finding_is_taken_or_refused_with_the_documented_error(name: str) -> None:
    """Every seed and every file of the corpus, each within its second."""
    target = targets.find(name)
    corpus = target.corpus()
    outcome = engine.run(target, corpus, runs=len(corpus), seed=0)
    assert outcome.inputs == len(corpus)
    assert not outcome.findings
    assert outcome.accepted or name == "tokens", (
        "not even the seeds are accepted: the target tests nothing behind the first check"
    )


def test_every_folder_of_the_corpora_belongs_to_a_target() -> None:
    """A renamed target must not leave its findings behind."""
    assert {path.name for path in targets.CORPORA.iterdir()} <= {each.name for each in targets.all_targets()}


def test_some_thousand_inputs_end_nothing_hang_nothing_and_take_no_memory() -> None:
    """The command of `make fuzz`, with few inputs: exit status 0, and a row for each target."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--runs", str(RUNS), "--seed", "2"],
        cwd=TESTS, capture_output=True, text=True, timeout=Deadline.SCRIPT.s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for target in targets.all_targets():
        assert f"\n{target.name} " in done.stdout


def test_a_target_that_fails_is_a_finding_and_so_is_one_that_dies(tmp_path: Path) -> None:
    """The engine itself: an undocumented error, an input that takes too long, and a documented error that is none."""

    def feed(data: bytes) -> None:
        match data:
            case b"a":
                raise KeyError("undocumented")
            case b"b":
                raise ValueError("documented")
            case b"c":
                # Until the alarm.
                while True:
                    pass

    target = targets.Target(
        name="a-test", make=lambda _: feed, allowed=(ValueError,), seeds=lambda: [b"a", b"b", b"c", b"d"], is_json=False
    )
    hung_s, engine.HUNG_S = engine.HUNG_S, 0.1  # type: ignore[misc]  # shorter, for this test alone
    slow_s, engine.SLOW_S = engine.SLOW_S, 0.02  # type: ignore[misc]  # as above
    try:
        outcome = engine.run(target, target.corpus(), runs=4, seed=0)
    finally:
        engine.HUNG_S, engine.SLOW_S = hung_s, slow_s  # type: ignore[misc]  # as above
    assert [finding.data for finding in outcome.findings] == [b"a", b"c"]
    assert (outcome.inputs, outcome.accepted) == (4, 1)
