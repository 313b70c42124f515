"""
The whole of: threads that copy side by side, until all of it is done.

Called from: pytest.
"""

import signal
import threading
from collections.abc import Iterator

import pytest

from pillion.copiers import Copiers


@pytest.fixture
def two() -> Iterator[Copiers]:
    """Two threads; ended afterwards."""
    made = Copiers(2, lambda: None)
    yield made
    made.close()


def test_all_jobs_have_run_when_each_returns(two: Copiers) -> None:
    """More jobs than threads too, and none at all."""
    ran: list[int] = []
    two.each([])
    two.each([lambda index=index: ran.append(index) for index in range(7)])  # type: ignore[misc] # one number each
    assert sorted(ran) == list(range(7))


def test_an_error_of_a_job_is_raised_when_all_have_ended(two: Copiers) -> None:
    """And the threads take the next jobs."""
    ran: list[int] = []

    def failing() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        two.each([failing, lambda: ran.append(1), lambda: ran.append(2)])
    assert sorted(ran) == [1, 2]
    two.each([lambda: ran.append(3)])
    assert 3 in ran


def test_an_interrupt_comes_when_no_job_runs_any_more(two: Copiers) -> None:
    """The slot is given up behind it: a copy that still ran would write into the next save."""
    ended = threading.Event()
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)

    def job() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        # The caller has had its interrupt by then, or has it while this one ends.
        for _ in range(1000):
            pass
        ended.set()

    try:
        with pytest.raises(KeyboardInterrupt):
            two.each([job])
        assert ended.is_set()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_thread_that_cannot_be_prepared_fails_its_jobs() -> None:
    """Instead of having its caller wait for ever."""

    def unable() -> None:
        raise AttributeError("omp_set_num_threads")

    made = Copiers(1, unable)
    try:
        with pytest.raises(AttributeError, match="omp"):
            made.each([lambda: None])
    finally:
        made.close()


def test_closing_ends_the_threads() -> None:
    """None of them is left."""
    made = Copiers(3, lambda: None)
    made.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("pillion-copy") for name in names), names
