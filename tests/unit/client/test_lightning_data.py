"""
The whole of: a shuffled epoch of several processes gives its order again after a resume, and the epochs behind it theirs.

Called from: pytest. Loaders and samplers have the shape of Lightning's and torchdata's, which are not installed here; tests/frameworks has
the real ones.
"""

from collections.abc import Iterator
from typing import Any

import torch

from pillion.lightning_data import Shuffles, generators


class Sampler:
    """As torchdata's: each iteration is one draw from a generator of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(16, generator=self.generator).tolist())


class Between:
    """As Lightning's, which draws when an epoch begins."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.order: list[int] = []

    def reset(self) -> None:
        self.order = list(self._sampler)


class Loader:
    """A loader whose sampler Lightning has replaced."""

    def __init__(self, seed: int) -> None:
        self.sampler = self
        self.dataset: Any = Between(Sampler(seed))

    def begin(self) -> list[int]:
        """Begin an epoch, and return its order."""
        self.dataset.reset()
        order: list[int] = self.dataset.order
        return order


def test_a_resume_within_an_epoch_draws_its_order_again_however_often_the_loader_draws() -> None:
    """The state of before the draw comes back, and one draw of it counts, so that the next epochs are equal too."""
    plain = Loader(1)
    orders = [plain.begin() for _ in range(4)]
    first, shuffles = Loader(1), Shuffles()
    shuffles.follow([first])
    assert [first.begin() for _ in range(2)] == orders[:2]
    begun = shuffles.state()

    second, resumed = Loader(9), Shuffles()
    resumed.follow([second])
    resumed.follow([second])  # Lightning prepares its loaders again
    resumed.repeat(begun)
    assert [second.begin() for _ in range(3)] == [orders[1]] * 3
    resumed.go_on()
    assert [second.begin() for _ in range(2)] == orders[2:]


def test_the_generator_below_lightnings_sampler_is_one_of_the_loaders_generators() -> None:
    """Behind the last batch of an epoch its state of now is saved, and gives the next epoch."""
    plain = Loader(1)
    orders = [plain.begin() for _ in range(2)]
    first, second = Loader(1), Loader(9)
    assert first.begin() == orders[0]
    for theirs, ours in zip(generators([second]), generators([first]), strict=True):
        theirs.set_state(ours.get_state())
    assert second.begin() == orders[1]


def test_loaders_of_one_process_are_left_as_they_are() -> None:
    """No sampler of Lightning's stands there, so there is nothing to follow, and a checkpoint without such states loads."""
    loader: Any = torch.utils.data.DataLoader([1, 2], shuffle=True)  # type: ignore[arg-type] # a list has what a dataset needs
    shuffles = Shuffles()
    shuffles.follow([loader])
    shuffles.repeat([])
    shuffles.go_on()
    assert shuffles.state() == []
    assert generators([loader]) == []
