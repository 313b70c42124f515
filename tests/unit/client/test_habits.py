"""
The whole of: which weights a script was seen to leave alone from a save to the next step, and which it was seen to change.

Called from: pytest.
"""

import gc
from collections.abc import Callable

import pytest
import torch

from pillion import habits, late, overlap
from pillion import leaves as leaves_module

ELEMENTS = 40_000


@pytest.fixture(autouse=True)
def small_states_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late, "USUAL_MIN_BYTES", 1)
    monkeypatch.setattr(late, "USUAL_MIN_MEAN_BYTES", 1)


class Script:
    """Two weights, the optimizer of both, and what is known of the script."""

    def __init__(self) -> None:
        self.weights = {name: torch.nn.Parameter(torch.rand(ELEMENTS)) for name in ("one", "two")}
        self.optimizer = torch.optim.SGD(self.weights.values(), lr=0.1)
        self.known = habits.Habits()
        self._collector = leaves_module.Collector()

    def save(self, *, forced: bool = False) -> late.Choice | None:
        leaves = self._collector.collect({"model": dict(self.weights)})
        choice = self.known.choose(leaves, forced=forced)
        if choice is not None:
            self.known.watch(leaves, choice.untried)
        return choice

    def step(self) -> None:
        self.known.stepping(self.optimizer)
        for weight in self.weights.values():
            weight.data.add_(1.0)


@pytest.fixture
def script() -> Script:
    made = Script()
    made.step()
    return made


def test_weights_wait_from_the_second_save_on_if_nothing_changed_them_behind_the_first(script: Script) -> None:
    """The first save watches; what a step alone changes is copied late from then on."""
    assert script.save() == late.Choice((), (0, 1), (0, 1))
    script.step()
    assert script.save() == late.Choice((0, 1), ())


def swap_in_and_out(weight: torch.Tensor) -> None:
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        weight.copy_(kept)


def exchange_rows(weight: torch.Tensor) -> None:
    weight.data.copy_(weight.data.roll(ELEMENTS // 2))


def one_element(weight: torch.Tensor) -> None:
    weight.data[12_345] += 1.0


def by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[7] = 0.5


@pytest.mark.parametrize("change", [swap_in_and_out, exchange_rows, one_element, by_numpy])
def test_a_weight_that_changes_behind_the_first_save_never_waits(
    script: Script, change: Callable[[torch.Tensor], None]
) -> None:
    """A change of any size by any means, even one that was undone, keeps that weight early for good; the other one waits."""
    script.save()
    change(script.weights["two"])
    script.step()
    for _ in range(2):
        assert script.save() == late.Choice((0,), (1,))
        script.step()


def test_a_weight_that_no_optimizer_stepped_since_the_last_save_does_not_wait(script: Script) -> None:
    """A save behind which nothing steps copies all at once: something else may have taken the weights over."""
    script.save()
    script.step()
    assert script.save() == late.Choice((0, 1), ())
    assert script.save() is None
    forced = script.save(forced=True)
    assert forced is not None
    assert forced.late == (0, 1)


def test_a_load_is_not_a_habit(script: Script) -> None:
    """A load between save and step changes weights; they are watched again from the next save on."""
    script.save()
    script.known.forget()
    script.weights["one"].data.zero_()
    script.step()
    assert script.save() == late.Choice((), (0, 1), (0, 1))
    script.step()
    assert script.save() == late.Choice((0, 1), ())


def test_what_replaces_the_data_of_a_weight_is_not_what_was_saved(script: Script) -> None:
    """`weight.data = other` leaves the saved memory alone, so it is no change of it."""
    script.save()
    script.weights["one"].data = torch.rand(ELEMENTS)
    script.step()
    assert script.save() == late.Choice((0, 1), ())


def test_a_watch_keeps_no_weights_of_an_optimizer_that_is_gone(script: Script) -> None:
    """A script that saves once, and drops model and optimizer, gets their memory back."""
    script.save()
    watched = script.known._trial
    assert watched is not None
    assert watched.tensors
    script.optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    gc.collect()
    assert not watched.tensors
    script.step()
    assert script.known._tried == set()


def test_a_step_never_fails_because_of_a_watch(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the comparison (a device out of memory) is logged, and the weights stay untried."""
    script.save()

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(habits, "digest", fail)
    script.step()
    monkeypatch.undo()
    assert script.known._tried == set()


def test_nothing_is_compared_while_a_cuda_graph_is_captured(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison synchronizes, which breaks a capture. Weights of the captured optimizer never wait."""
    script.save()
    monkeypatch.setattr(overlap, "capturing", lambda: True)
    script.step()
    monkeypatch.setattr(overlap, "capturing", lambda: False)
    script.step()
    assert script.save() == late.Choice((), (0, 1))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex128, torch.float8_e4m3fn, torch.uint16]
)
@pytest.mark.parametrize("numel", [40_000, 40_001])
def test_a_digest_sees_one_element_of_any_dtype(dtype: torch.dtype, numel: int) -> None:
    """Bits are summed, so that NaN equals itself; a length that is no multiple of a word is whole too."""
    tensor = torch.zeros(numel, dtype=torch.uint8).to(dtype)
    before = habits.digest(tensor)
    assert torch.equal(before, habits.digest(tensor))
    for index in (0, 12_345, numel - 1):
        # A view of real parts for complex numbers, whose bits no integer has.
        bits = overlap.as_words(tensor[index : index + 1])
        bits += 1
        assert not torch.equal(before, habits.digest(tensor))
        bits -= 1
    assert torch.equal(before, habits.digest(tensor))
