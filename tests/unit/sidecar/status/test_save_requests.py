"""Saves that somebody outside the job asked for: each is done once, and answered until nobody asks any more."""

from pillion.wire import home
from pillion_sidecar.status import save_requests


def told(of: save_requests.SaveRequests) -> dict[str, tuple[str, int]]:
    return {each.id: (each.progress, each.step) for each in of.acknowledgements()}


def test_a_demand_is_accepted_and_done_with_the_step_of_the_next_persisted_save() -> None:
    """All that wait are met by one save; what began before them is not it."""
    of = save_requests.SaveRequests()
    of.began(10)
    assert of.take(["a", "b"], 0.0, has_trainers=True)
    assert of.waiting
    of.ended(10, None)
    assert told(of) == {"a": ("Accepted", -1), "b": ("Accepted", -1)}
    of.began(12)
    assert not of.waiting
    assert not of.take(["a", "b"], 1.0, has_trainers=True)
    assert of.take(["a", "b", "c"], 1.0, has_trainers=True)
    of.ended(12, None)
    assert told(of) == {"a": ("Done", 12), "b": ("Done", 12), "c": ("Accepted", -1)}


def test_a_final_answer_is_repeated_as_long_as_it_is_asked_for_and_the_demand_is_never_done_twice() -> None:
    """Once no answer has the id it is silent; when it comes again it says what it said, and asks for nothing."""
    of = save_requests.SaveRequests()
    of.take(["a"], 0.0, has_trainers=True)
    of.began(1)
    of.ended(1, "PersistError: disk full")
    assert told(of) == {"a": ("Failed", 1)}
    of.take([], 1.0, has_trainers=True)
    assert told(of) == {}
    assert not of.take(["a"], 2.0, has_trainers=True)
    assert told(of) == {"a": ("Failed", 1)}
    assert of.acknowledgements()[0].message == "PersistError: disk full"


def test_what_no_save_begins_for_fails_at_its_bound_or_with_the_trainers() -> None:
    """A demand is bounded until its save begins; from then on the save is."""
    of = save_requests.SaveRequests()
    of.take(["begun"], 0.0, has_trainers=True)
    of.began(5)
    of.take(["begun", "late"], 10.0, has_trainers=True)
    of.expire(10.0 + save_requests.START_TIMEOUT_S - 1, has_trainers=True)
    assert told(of) == {"begun": ("Accepted", -1), "late": ("Accepted", -1)}
    of.expire(10.0 + save_requests.START_TIMEOUT_S, has_trainers=True)
    assert told(of) == {"begun": ("Accepted", -1), "late": ("Failed", -1)}
    of.take(["begun", "left"], 1000.0, has_trainers=True)
    of.expire(1000.0, has_trainers=False)
    assert told(of) == {"begun": ("Accepted", -1), "left": ("Failed", -1)}
    assert not of.take(["nobody"], 1000.0, has_trainers=False)
    assert told(of)["nobody"] == ("Failed", -1)


def test_the_last_finished_ones_are_remembered_and_no_more() -> None:
    """Memory is bounded, and the bound is above what a controller has open at once."""
    of = save_requests.SaveRequests()
    names = [f"{number}" for number in range(save_requests.REMEMBERED + 10)]
    for number, name in enumerate(names):
        of.take([name], 0.0, has_trainers=True)
        of.began(number)
        of.ended(number, None)
    of.take(names, 0.0, has_trainers=False)
    done = [each.id for each in of.acknowledgements() if each.progress == home.Progress.DONE]
    assert len(of.acknowledgements()) <= save_requests.REMEMBERED
    assert set(done) <= set(names[10:])


def test_a_persons_request_is_followed_by_its_id_and_unknown_to_the_controller() -> None:
    """Only the first call asks the trainers; the outcome is that of the save that served it."""
    of = save_requests.SaveRequests()
    answer, asks = of.ask("mine", 0.0, has_trainers=True)
    assert (answer.progress, answer.step, asks) == ("Accepted", -1, True)
    assert told(of) == {}
    of.began(7)
    answer, asks = of.ask("mine", 1.0, has_trainers=True)
    assert (answer.progress, answer.step, asks) == ("Accepted", 7, False)
    of.ended(7, None)
    answer, asks = of.ask("mine", 2.0, has_trainers=False)
    assert (answer.progress, answer.step, asks) == ("Done", 7, False)


def test_a_persons_request_fails_without_trainers_at_its_bound_and_in_a_crowd() -> None:
    """Nobody who can open the socket makes the sidecar remember more."""
    of = save_requests.SaveRequests()
    assert of.ask("nobody", 0.0, has_trainers=False)[0].message == "no trainer is connected to the sidecar"
    for number in range(save_requests.REMEMBERED):
        assert of.ask(f"{number}", 0.0, has_trainers=True)[1]
    refused, asks = of.ask("more", 0.0, has_trainers=True)
    assert (refused.progress, asks) == ("Failed", False)
    assert "requests are open already" in refused.message
    assert of.ask("0", save_requests.START_TIMEOUT_S, has_trainers=True)[0].progress == "Failed"
    assert of.ask("more", save_requests.START_TIMEOUT_S, has_trainers=True)[1]
